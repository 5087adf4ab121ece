"""``mythos-edge serve``: an OpenAI-compatible server of one bundle, with a page that shows depth."""

import argparse
import re
import socket
from pathlib import Path
from typing import Any

from mythos_edge.model.bounded_files import read_bounded
from mythos_edge.model.errors import UsageError, unavailable
from mythos_edge.runtime.chat_template import ChatTemplate
from mythos_edge.runtime.halting import depth_of_preset
from mythos_edge.runtime.options import Options
from mythos_edge.runtime.session import Session
from mythos_edge.scripts import arguments, options
from mythos_edge.scripts.console import Console

HELP = "serve a bundle to clients of OpenAI's API, and a page that shows depth"
EXAMPLE = "mythos-edge serve model.bundle --port 8080 --slots 8"

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_UVICORN: dict[str, Any] = {
    "log_level": "warning",
    "server_header": False,
    "lifespan": "on",
    "ws": "none",
    "timeout_graceful_shutdown": 10,
}
_MOST_KEY_BYTES = 1 << 20
# Options of depth, each with its value where the command line sets none.
_DEFAULTS = {"policy": "exact", "min_depth": 1, "max_depth": None, "threshold": None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_bundle(parser)
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="default: 127.0.0.1, this machine alone")
    parser.add_argument("--port", type=int, default=8080, metavar="N", help="0 is any free one (default: 8080)")
    parser.add_argument(
        "--api-key-file", type=arguments.path, metavar="FILE", help="keys, one a line, of which one is needed"
    )
    parser.add_argument("--slots", type=int, default=8, metavar="N", help="requests that run at once (default: 8)")
    parser.add_argument("--queue", type=int, default=64, metavar="N", help="requests that may wait (default: 64)")
    parser.add_argument(
        "--cache-memory", default="2GB", metavar="SIZE", help="for prompts that were computed before (default: 2GB)"
    )
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds of a request (default: 600)")
    parser.add_argument(
        "--cors", action="append", default=[], metavar="ORIGIN", help="a web origin that may ask (repeatable)"
    )
    parser.add_argument(
        "--chat-template",
        metavar="T",
        help="chatml, plain (the texts alone) or a file (default: the bundle's, or plain)",
    )
    options.add_depth(parser)
    options.add_target(parser)
    options.add_selftest(parser)
    options.add_threads(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    try:
        import uvicorn

        from mythos_edge.runtime.serving import app, engine
    except ImportError as error:
        raise unavailable(error, "serving", "pip install 'mythos-edge[serve]'") from error
    for name in ("slots", "queue"):
        if getattr(args, name) < (1 if name == "slots" else 0):
            raise UsageError(f"--{name} is {getattr(args, name)}, expected at least {1 if name == 'slots' else 0}")
    if not 0 < args.timeout < float("inf"):
        raise UsageError(f"--timeout is {args.timeout}, expected seconds above 0")
    cache_bytes, keys = _bytes(args.cache_memory), _keys(args.api_key_file)
    with options.session_of(args) as session, _bound(args.host, args.port) as listening:
        manifest = session.bundle.manifest
        defaults = _defaults(args, session)
        template = ChatTemplate.of(session.bundle, args.chat_template)
        target = args.target or (manifest.presets[args.preset].target if args.preset else manifest.default_target)
        running = engine.Engine(session, args.slots, args.queue, cache_bytes)
        address = _address(listening)

        def ready() -> None:
            talk = f"chat template {template.name}" + (
                "" if args.chat_template or not template.is_plain else " (it has none)"
            )
            console.say(f"serving {session.bundle.path.name} ({target}; {talk}) at {address}")
            if args.host not in ("127.0.0.1", "localhost", "::1") and not keys:
                console.note("note: everybody who reaches this address may use it: --api-key-file asks for a key")

        serving = app.Serving(
            session=session,
            engine=running,
            template=template,
            name=session.bundle.path.name,
            target=target,
            defaults=defaults,
            keys=keys,
            origins=tuple(args.cors),
            limits=app.Limits(request_s=args.timeout),
            ready=ready,
        )
        config: Any = uvicorn.Config(app.app_of(serving), **_UVICORN)
        server = uvicorn.Server(config)
        try:
            server.run(sockets=[listening])
        except KeyboardInterrupt:
            # A signal that asked for the end is raised once more when it has been reached.
            if not server.should_exit:
                raise
        finally:
            running.close()
    console.result({"address": address, "requests": dict(running.counts)})
    return 0


def _defaults(args: argparse.Namespace, session: Session) -> dict[str, Any]:
    """The depth of requests that set none: the preset's, and what the command line says. Raises UsageError."""
    defaults = {} if args.preset is None else depth_of_preset(session.bundle.manifest, args.preset)
    defaults |= {name: getattr(args, name) for name, usual in _DEFAULTS.items() if getattr(args, name) != usual}
    Options(**defaults).depth.resolve(session.model)
    return defaults


def _bound(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UsageError where it cannot."""
    if not 0 <= port < 1 << 16:
        raise UsageError(f"--port is {port}, expected 0 to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=256)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot serve at {host}:{port}: {why}: choose another --port or --host") from error


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)\s*([kmg]?b?)", text.strip().lower())
    unit = None if found is None else found[2] if found[2].endswith("b") or not found[2] else f"{found[2]}b"
    if found is None or unit not in (*_UNITS, "b"):
        raise UsageError(f"--cache-memory is {text!r}, expected a size such as 500MB or 2GB; 0 keeps nothing")
    return int(float(found[1]) * _UNITS.get(unit, 1))


def _keys(path: Path | None) -> tuple[str, ...]:
    """The keys in a file, one a line. Raises UsageError for a file without any."""
    if path is None:
        return ()
    try:
        lines = read_bounded(path, _MOST_KEY_BYTES, "a file of keys").decode("utf-8-sig").splitlines()
    except OSError as error:
        raise UsageError(f"{path}: cannot read the API keys: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: the API keys are no UTF-8 text: {error}") from error
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise UsageError(f"{path}: has no API key, expected one a line")
    return keys
