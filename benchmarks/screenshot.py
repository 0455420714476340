"""The picture of README: the report on the demo's own run, as a browser shows it.

python -m benchmarks.screenshot               # runs `loka demo` first
python -m benchmarks.screenshot --db run.db   # of a run that is there
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from benchmarks.chromium import chromium
from loka.bounds import Bound
from loka.reports.build import built_of
from loka.reports.html_report import render

PICTURE: Final[Path] = Path(__file__).parents[1] / "docs" / "images" / "report.png"
_WIDTH, _HEIGHT = 1200, 1180
_LIMIT: Final[int] = 300_000


def picture_of(db: Path, out: Path) -> int:
    """Write the picture of a run's report and return its size in bytes."""
    built = built_of(db, Bound(row_error=0.05))
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        page_file = Path(folder) / "report.html"
        page_file.write_text(render(built.report, built.material), encoding="utf-8")
        page = browser.new_page(viewport={"width": _WIDTH, "height": _HEIGHT}, color_scheme="light")
        page.goto(page_file.as_uri())
        page.wait_for_selector("#errors-chart .main-svg")
        page.wait_for_timeout(500)  # fonts and the last layout
        out.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=out)
    return out.stat().st_size


def main() -> None:
    """Take the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--db", type=Path, help="a probe database; the demo's by default")
    parser.add_argument("--out", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.db is None:
            subprocess.run([sys.executable, "-m", "loka", "demo", "--out", folder], check=True)
        size = picture_of(arguments.db or Path(folder) / "run.db", arguments.out)
    if size > _LIMIT:
        raise SystemExit(f"{arguments.out} has {size:,} bytes, more than the {_LIMIT:,} that a README should load.")
    print(f"wrote {arguments.out}, {size:,} bytes")


if __name__ == "__main__":
    main()
