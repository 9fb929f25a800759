"""The page in a browser: seeds side by side, previews, time left, a drawn mask, download, cancel, history."""

import contextlib
import threading
import time

import numpy as np
import pytest
import uvicorn
from browser import chromium, complaints
from PIL import Image
from small_server import application

from walt_jax.data.media import write_video
from walt_jax.serving.fields import Limits
from walt_jax.serving.worker import Worker

pytestmark = pytest.mark.usefixtures("quick_compilation")


@contextlib.contextmanager
def served(generator, folder, makes=True):
    """(address, jobs) of a server in a thread; videos wait for ever if it does not make them."""
    app, _, jobs = application(generator, folder, Limits(steps=1000))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="on" if makes else "off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", jobs
    finally:
        server.should_exit = True
        thread.join(20)


def wait_for(found, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.05)
    raise AssertionError("it did not come")


def test_what_is_typed_while_seeds_are_sent_does_not_change_them(generator, tmp_path):
    """And a deleted video does not come back with an answer that was under way."""
    with (
        served(generator, tmp_path / "videos", makes=False) as (address, jobs),
        chromium(tmp_path / "profile") as driver,
    ):
        driver.get(address)
        wait_for(lambda: driver.execute_script("return document.getElementById('width').value === '16'"))
        driver.execute_script(
            """const [prompt, count] = ["prompt", "count"].map(id => document.getElementById(id));
            prompt.value = "first"; count.value = 2; document.getElementById("form").requestSubmit();
            prompt.value = "second"; count.value = 1;"""
        )
        wait_for(lambda: len(jobs.all()) == 2)
        assert [(job.asked["prompt"], job.asked["seed"]) for job in jobs.all()] == [("first", 0), ("first", 1)]
        wait_for(lambda: driver.execute_script("return document.querySelectorAll('article').length === 2"))
        cards = driver.execute_async_script(
            """const done = arguments[0];
            (async () => {
              const {data} = await (await call("/v1/videos")).json();
              await Promise.all(data.map(video => remove(video.id)));
              await Promise.all(data.map(show));
              done(document.querySelectorAll("article").length);
            })();"""
        )
        assert cards == 0 and not jobs.all() and not complaints(driver)


def slowly(worker, job, done, advance=Worker._advance):
    if job.asked["prompt"] == "long":
        time.sleep(0.01)
    advance(worker, job, done)


@pytest.mark.slow
def test_the_whole_page(generator, tmp_path, monkeypatch):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    with served(generator, tmp_path / "videos") as (address, jobs), chromium(tmp_path / "profile") as driver:

        def all_of(selector):
            return driver.find_elements(By.CSS_SELECTOR, selector)

        def fill(**values):
            for name, value in values.items():
                driver.execute_script(f"document.getElementById('{name}').value = arguments[0]", value)

        def generate():
            driver.find_element(By.ID, "make").click()

        driver.get(address)
        wait_for(lambda: driver.find_element(By.ID, "width").get_attribute("value") == "16")

        # Three seeds of one request are next to each other and play together.
        fill(prompt="ab", count=3, steps=2)
        generate()
        wait_for(lambda: len(all_of(".request article video")) == 3)
        assert len(all_of(".request")) == 1
        assert [card.get_attribute("data-seed") for card in all_of("article")] == ["0", "1", "2"]
        wait_for(
            lambda: driver.execute_script("return [...document.querySelectorAll('video')].every(v => v.readyState > 2)")
        )
        [together] = [one for one in all_of(".request nav button") if one.text == "Play together"]
        together.click()
        time.sleep(0.7)
        times = driver.execute_script(
            "return [...document.querySelectorAll('video')].map(v => [v.currentTime, v.paused])"
        )
        assert all(not paused for _, paused in times) and np.ptp([now for now, _ in times]) < 0.2, times
        link = all_of("article a")[0]
        assert link.get_attribute("href").startswith("blob:") and link.get_attribute("download").endswith(".mp4")
        driver.save_screenshot(str(tmp_path / "seeds.png"))

        # A long one, which takes longer than a browser under load does: frames denoise, time left, the queue; cancelled
        # while it is made.
        monkeypatch.setattr(Worker, "_advance", slowly)
        fill(prompt="long", count=2, steps=1000, num_frames=5)
        generate()
        fill(prompt="b", count=1, steps=2, num_frames=9)
        generate()
        wait_for(lambda: all_of("article[data-status=in_progress] img"))
        wait_for(lambda: any("left" in one.text for one in all_of("article[data-status=in_progress] .state")))
        driver.save_screenshot(str(tmp_path / "denoising.png"))
        [cancel] = [one for one in all_of(".request nav button") if one.text == "Cancel all"]
        driver.execute_script("arguments[0].click()", cancel)  # wherever it has moved to meanwhile
        wait_for(lambda: sorted(job.asked["prompt"] for job in jobs.all()) == ["ab", "ab", "ab", "b"])
        wait_for(lambda: len(all_of(".request")) == 2 and len(all_of("article video")) == 4)

        # A mask drawn on a picture, then on a clip: the left part is white.
        Image.fromarray(np.full((40, 40, 3), (200, 60, 30), np.uint8)).save(tmp_path / "picture.png")
        write_video(tmp_path / "clip.mp4", np.full((9, 32, 32, 3), (30, 160, 60), np.uint8), 8)
        driver.execute_script("document.getElementById('media').open = true")
        for number, (field, path) in enumerate((("image", "picture.png"), ("video", "clip.mp4"))):
            driver.find_element(By.ID, "nothing").click()
            driver.find_element(By.ID, field).send_keys(str(tmp_path / path))
            canvas = driver.find_element(By.ID, "paint")
            wait_for(canvas.is_displayed)
            width = canvas.size["width"]
            driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
            fill(brush=40)
            drag = ActionChains(driver).move_to_element_with_offset(canvas, -width * 0.35, -width * 0.45)
            drag.click_and_hold()
            drag.move_by_offset(0, width * 0.45).move_by_offset(0, width * 0.45).release().perform()
            driver.save_screenshot(str(tmp_path / f"mask_{field}.png"))
            fill(prompt=f"mask {number}", steps=2)
            driver.execute_script("document.getElementById('form').requestSubmit()")
            wait_for(lambda prompt=f"mask {number}": jobs.all()[-1].asked["prompt"] == prompt)
            job = jobs.all()[-1]
            drawn = np.asarray(Image.open(jobs.path(job) / "mask").convert("L"))
            assert drawn.shape == (16, 16) and set(np.unique(drawn)) == {0, 255}
            assert (drawn[:, :3] == 255).mean() > 0.9 and (drawn[:, 9:] == 0).all()
            wait_for(lambda job=job: job.status in ("completed", "failed"))
            assert job.status == "completed", job.error

        # What was made is there when the page is opened again.
        driver.get(address)
        wait_for(lambda: len(all_of("article video")) == 6)
        assert [one.text for one in all_of(".request h2")] == ["mask 1", "mask 0", "b", "ab"]
        driver.save_screenshot(str(tmp_path / "history.png"))
        assert not complaints(driver)


@pytest.mark.slow
def test_older_videos_come_page_by_page(generator, tmp_path):
    with served(generator, tmp_path / "videos") as (address, jobs), chromium(tmp_path / "profile") as driver:
        from selenium.webdriver.common.by import By

        from walt_jax.serving.jobs import new

        asked = {
            "prompt": "", "negative_prompt": "", "seed": 0, "steps": 1, "guidance": 1.0, "fps": 8.0, "num_frames": 9,
            "height": 16, "width": 16, "extend": None, "strength": 1.0, "files": {},
        }  # fmt: skip
        for number in range(45):
            name, _ = jobs.new_folder()
            job = new(name, {**asked, "prompt": f"number {number}"}, name)
            job.status, job.error, job.created_at = "failed", {"code": "x", "message": "no"}, 1000.0 + number
            jobs.add(job)
        driver.get(address)
        wait_for(lambda: len(driver.find_elements(By.TAG_NAME, "article")) == 40)
        button = driver.find_element(By.ID, "older")
        assert button.is_displayed()
        driver.execute_script("arguments[0].click()", button)
        wait_for(lambda: len(driver.find_elements(By.TAG_NAME, "article")) == 45)
        titles = [one.text for one in driver.find_elements(By.TAG_NAME, "h2")]
        assert titles == [f"number {number}" for number in range(44, -1, -1)] and not button.is_displayed()
