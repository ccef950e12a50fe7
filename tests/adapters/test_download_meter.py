"""What the meter makes of files that arrive, were cached or begin anew."""

from server.adapters.download_meter import DownloadMeter


def test_files_add_up_whether_downloaded_cached_or_begun_anew() -> None:
    seen: list[tuple[int, int]] = []
    meter = DownloadMeter(lambda done, total: seen.append((done, total)))
    meter.report()
    meter.start(100)
    for num_bytes in (5, 25, 0, 40):
        meter.file_has(num_bytes)
    meter.end_file(40)
    meter.end_file(60)
    assert seen == [(0, 0), (0, 100), (5, 100), (25, 100), (25, 100), (40, 100), (40, 100), (100, 100)]


def test_what_it_reports_never_exceeds_the_total() -> None:
    seen: list[int] = []
    meter = DownloadMeter(lambda done, _: seen.append(done))
    meter.start(10)
    meter.file_has(50)
    assert seen == [0, 10]
