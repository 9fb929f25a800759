"""The file name suffixes of videos and images, for all modes."""

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif", ".ts", ".mts", ".m2ts"),
    *(".flv", ".mpg", ".mpeg", ".wmv", ".asf", ".3gp", ".ogv"),
)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
SUFFIXES = VIDEO_SUFFIXES + IMAGE_SUFFIXES
