"""What the meter makes of the client's reports, for plain HTTP and for Xet storage."""

from types import SimpleNamespace

import pytest
from huggingface_hub.utils import _xet_progress_reporting as xet

from server.adapters.download_meter import MAX_EXCESS_BYTES, DownloadMeter, ignore_progress
from server.errors import AdapterDownloadError


def test_files_add_up_whether_downloaded_cached_or_begun_anew() -> None:
    seen: list[tuple[int, int]] = []
    meter = DownloadMeter(lambda done, total: seen.append((done, total)), 100)
    meter.start_file()
    with meter.bar_class()(initial=5, total=40, desc="a") as bar:
        bar.update(20)
        bar.update(-20)  # the client rolls back when a server ignores its range
        bar.update(35)
    meter.end_file(40)
    meter.start_file()
    meter.end_file(60)
    assert [done for done, _ in seen] == [0, 5, 25, 5, 40, 40, 40, 100]
    assert {total for _, total in seen} == {100}


def test_a_flood_is_stopped() -> None:
    meter = DownloadMeter(ignore_progress, 100)
    bar = meter.bar_class()()
    bar.update(100 + MAX_EXCESS_BYTES)
    with pytest.raises(AdapterDownloadError, match="more than the 100 bytes"):
        bar.update(1)


def test_xet_downloads_count_the_bytes_written_once() -> None:
    """The client's own reporter for Xet storage, which most Hub files have, drives the bar as in a download."""
    seen: list[int] = []
    meter = DownloadMeter(lambda done, _: seen.append(done), 100)
    with xet.XetDownloadProgressReporter(
        reconstruction_desc="a", total=100, log_level=30, name="b", tqdm_class=meter.bar_class()
    ) as reporter:
        for written, received in ((0, 30), (50, 60), (100, 80)):
            reporter.update_progress(
                SimpleNamespace(
                    total_bytes=100,
                    total_bytes_completed=written,
                    total_transfer_bytes_completed=received,
                    total_bytes_completion_rate=1.0,
                    total_transfer_bytes_completion_rate=None,
                )
            )
    assert seen == [0, 50, 100]
