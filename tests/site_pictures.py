"""Pictures of the site, wide and narrow, light and dark, taken with Chromium.

``python -m tests.site_pictures FOLDER`` builds the site into ``FOLDER/site``, serves it
on 127.0.0.1, writes a picture per page, width and color beside it and one of each
search, and prints what the searches found. It needs the ``docs`` extra, ``pip install
playwright``, and a ``chromium`` on the path. A person looks at the pictures: nothing is
compared.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "selective_optim" / "docs"
PAGES = [
    str(path.relative_to(DOCS).with_suffix("")) for path in sorted(DOCS.rglob("*.md"))
]
SEARCHES = "bias", "resume", "Muon"
WIDTHS = {"wide": 1400, "narrow": 390}
COLORS = "light", "dark"
FLAGS = (
    *("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder, and give its address."""
    handler = functools.partial(Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def chromium() -> Iterator[Any]:
    """Start Chromium, and end it."""
    program = shutil.which("chromium") or sys.exit("apt-get install chromium")
    with import_module("playwright.sync_api").sync_playwright() as player:
        browser = player.chromium.launch(
            executable_path=program, args=FLAGS, chromium_sandbox=False
        )
        yield browser
        browser.close()


def take(browser: Any, address: str, folder: Path, pages: Sequence[str]) -> None:
    for color in COLORS:
        for width, size in WIDTHS.items():
            viewport = {"width": size, "height": 1000}
            page = browser.new_page(viewport=viewport, color_scheme=color)
            page.on("requestfailed", lambda request: print("failed:", request.url))
            for name in pages:
                page.goto(f"{address}/{name}.html")
                picture = folder / f"{name.replace('/', '_')}_{width}_{color}.png"
                page.screenshot(path=picture, full_page=True)
            page.close()


def search(browser: Any, address: str, folder: Path, text: str) -> list[str]:
    """Type into the search, and return the titles of what it finds."""
    page = browser.new_page(viewport={"width": WIDTHS["wide"], "height": 1000})
    page.goto(f"{address}/index.html")
    page.locator(".md-search__input").click()
    ready = page.locator(".md-search-result__meta", has_text="Type to start searching")
    ready.wait_for()
    page.locator(".md-search__input").press_sequentially(text)
    page.locator(".md-search-result__item").first.wait_for()
    page.screenshot(path=folder / f"search_{text}.png")
    found: list[str] = page.locator(".md-search-result__article h1").all_inner_texts()
    page.close()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m tests.site_pictures")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pages", nargs="*", default=PAGES)
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    build = [sys.executable, "-m", "mkdocs", "build", "-q", "-f", ".mkdocs.yml"]
    subprocess.run([*build, "-d", str(folder / "site")], check=True, cwd=ROOT)
    with served(folder / "site") as address, chromium() as browser:
        take(browser, address, folder, options.pages)
        for text in SEARCHES:
            print(f"{text}: {', '.join(search(browser, address, folder, text))}")


if __name__ == "__main__":
    main()
