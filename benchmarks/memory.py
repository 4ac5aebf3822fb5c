"""Memory of a process from /proc (Linux): no package, so that it runs in every environment."""

from __future__ import annotations

from pathlib import Path


def memory_mib(process: int | str) -> dict[str, float]:
    """rss, private (anonymous), file-backed, peak RSS and proportional set size in MiB; zeros when it is gone.

    A file mapped twice counts twice in RSS and once in PSS, as it does in the machine's memory.
    """
    kib = {"VmRSS": 0, "RssAnon": 0, "RssFile": 0, "VmHWM": 0}
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in kib:
                kib[key] = int(value.split()[0])
    except (FileNotFoundError, ProcessLookupError):
        pass
    names = {"rss_mib": "VmRSS", "rss_private_mib": "RssAnon", "rss_file_mib": "RssFile", "rss_peak_mib": "VmHWM"}
    found = {name: round(kib[key] / 1024, 1) for name, key in names.items()}
    return {**found, "pss_mib": round(_pss_kib(process) / 1024, 1)}


def _pss_kib(process: int | str) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
