"""Takes the pictures of the page that docs/ shows: two answers to one text at two depths, in light and in dark.

    python -m mythos_edge.scripts.lab.draw_page out/words.bundle -o docs/page.png

Writes the light picture to OUTPUT, and the dark one beside it with ``-dark`` in its name. The model is that of
``train_words``, exported. Needs what ``lab.browser`` needs; with the font Inter (Debian's fonts-inter) it is prettier.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mythos_edge.scripts.lab.browser import Browser, browser

_MOST_BYTES = 400_000
_VIEW = {"width": 1400, "height": 720}
_DONE = "document.getElementById('stop').hidden && document.querySelectorAll('.answer:not(.working)').length == 2"


@contextmanager
def served(bundle: Path) -> Iterator[str]:
    """The address of a server of ``bundle``, which runs until the end of the block."""
    argv = [sys.executable, "-u", "-m", "mythos_edge", "serve", str(bundle), "--port", "0"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+", line := process.stdout.readline())
            if found is None:
                raise SystemExit(f"the server did not start: {line}")
            yield found[0]
        finally:
            process.terminate()


def take(page: Browser, address: str, args: argparse.Namespace, theme: str, output: Path) -> None:
    """Asks for two answers and takes their picture."""
    page.open(address, viewport=_VIEW, deviceScaleFactor=2, colorScheme=theme, reducedMotion="reduce")
    page.wait("document.body.classList.contains('ready')")
    page.call("check", "#compare")
    for control, value in {
        "answer-2-max_depth": args.second_depth,
        "sampling-temperature": args.temperature,
        "sampling-max_tokens": args.tokens,
        "sampling-seed": args.seed,
    }.items():
        page.call("fill", f"#{control}", str(value))
    page.call("fill", "#prompt", args.prompt)
    page.call("press", "#prompt", "Enter")
    page.wait(_DONE)
    # Again, so that the times are those of a server that has warmed up.
    page.call("click", "#retry")
    page.wait(_DONE)
    page.js("document.activeElement.blur(), document.getElementById('settings').scrollTo(0, 0)")
    page.call("hover", f".token >> nth={args.pointed}")
    page.call("screenshot", {"path": str(output)})
    size = output.stat().st_size
    if size > _MOST_BYTES:
        raise SystemExit(f"{output} has {size} bytes, expected at most {_MOST_BYTES}: take a shorter text")
    print(f"wrote {output}, {size / 1e3:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Take the pictures of the page.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/page.png"))
    parser.add_argument("--prompt", default="Return a new")
    parser.add_argument("--second-depth", type=int, default=3, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.45)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--seed", type=int, default=19)
    parser.add_argument("--pointed", type=int, default=20, metavar="N", help="the token that the pointer is on")
    args = parser.parse_args()
    dark = args.output.with_stem(f"{args.output.stem}-dark")
    with served(args.bundle) as address, browser() as page:
        take(page, address, args, "light", args.output)
        take(page, address, args, "dark", dark)


if __name__ == "__main__":
    main()
