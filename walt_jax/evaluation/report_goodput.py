"""The report's account of time: a bar for each attempt, and a table."""

import pathlib

from walt_jax.clock import CLOCK, PARTS, account, read_clock

# In both colour schemes of the page: what is useful is strong, downtime is hatched.
COLOURS = dict(
    zip(PARTS, ("#2a7f5f", "#c8553d", "#8a6fb0", "#d9a441", "#4a86b8", "#5fb0a5", "#9aa0a6", "#d0d4d9"), strict=True)
)
LONGEST = 60  # bars; of more attempts the last ones are shown


def goodput_section(workdir: pathlib.Path) -> str:
    """HTML on where the run's time went; empty without a `clock.jsonl`."""
    total = account(read_clock(workdir / CLOCK))
    if not total.attempts:
        return ""
    seconds = total.seconds()
    shown = [part for part in PARTS if seconds[part] > 0]
    keys = "".join(f'<span><i style="background: {COLOURS[part]}"></i>{_named(part)}</span>' for part in shown)
    longest = max(sum(attempt.seconds.values()) for attempt in total.attempts) or 1.0
    bars = []
    for attempt in total.attempts[-LONGEST:]:
        parts = "".join(
            f'<i style="width: {100 * attempt.seconds[part] / longest:.3f}%; background: {COLOURS[part]}" '
            f'title="{_named(part)}: {attempt.seconds[part]:.1f} s"></i>'
            for part in ("downtime", *PARTS[:-1])
            if attempt.seconds[part] > 0
        )
        bars.append(f'<div class="bar"><b>{attempt.number}</b><span>{parts}</span></div>')
    head = "".join(f'<th class="number">{_named(part)}</th>' for part in shown)
    rows = "".join(
        f"<tr><td>{name}</td>" + "".join(f'<td class="number">{each[part]:,.1f}</td>' for part in shown) + "</tr>\n"
        for name, each in [("all", seconds), *((str(a.number), a.seconds) for a in total.attempts)]
    )
    head = f"<thead><tr><th>attempt</th>{head}</tr></thead>"
    return (
        f"<p>{total.sentence().capitalize()}.</p>\n"
        f'<div class="clock"><div class="keys">{keys}</div>\n{"".join(bars)}</div>\n'
        "<details><summary>Seconds of each attempt</summary>"
        f'<div class="wide"><table>{head}<tbody>\n{rows}</tbody></table></div></details>'
    )


def _named(part: str) -> str:
    return part.replace("_", " ")
