"""The fuzzer: a fast part of its run over every reader, and that it sees what breaks its rules."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

from mythos_edge.scripts.lab import fuzz, fuzz_mutations
from mythos_edge.scripts.lab.fuzz_readers import READERS

INPUTS = 4500


def test_no_reader_is_hurt_by_a_few_thousand_hostile_inputs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", fuzz.__name__, "-n", str(INPUTS), "--seed", "ci", "--failures", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    told = json.loads(ran.stdout.splitlines()[-1])
    assert (told["inputs"], told["failures"]) == (INPUTS, 0)
    assert list(told["readers"]) == list(READERS)
    for name, figures in told["readers"].items():
        assert figures["inputs"] == figures["refused"] + figures["accepted"] + figures["ended"], name
        assert figures["refused"] > 0, name
        assert figures["places"] > 20, name
    assert list(tmp_path.iterdir()) == []


# By the input that does it: which rule is found to be broken.
BROKEN = {
    "raise ValueError('not ours')": "raised ValueError at <string>:1",
    "open('/etc/hostname').close()": "touched what is not its own",
    "import os; os.makedirs('../made', exist_ok=True)": "touched what is not its own",
    "import socket; socket.getaddrinfo('localhost', 1)": "touched what is not its own",
    "import os; os.system('true')": "touched what is not its own",
    # What is measured is a megabyte off now and then.
    "bytearray(600 << 20)[::4096] = b'1' * (600 << 8)": "took about 600 MB",
    "import os; os.abort()": "died of SIGABRT",
    "while True: pass": "took longer than 1.5 s",
    "from mythos_edge.model.errors import UsageError; raise UsageError": "told badly (0 characters)",
}
PROGRAM = """
import json, sys
from collections import Counter
from pathlib import Path
from mythos_edge.scripts.lab import fuzz, fuzz_readers
fuzz.MOST_SECONDS = 1.5
for program in json.loads(sys.argv[1]):
    changed = lambda *_: program.encode()
    reader = fuzz.READERS["own"] = fuzz_readers.Reader("own", changed, lambda *_: (exec, [b"1"]), 1.0)
    ran = fuzz.run(reader, 2, "0", Path("."), Path("failures"))
    print(json.dumps([ran.inputs, ran.failures]))
"""


def test_what_breaks_a_rule_is_found_and_kept(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, json.dumps([*BROKEN, "1"])]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=tmp_path)
    found = []
    for inputs, failures in map(json.loads, ran.stdout.splitlines()):
        told: Counter[str] = Counter()
        for what, count in failures.items():
            told[re.sub(r"^took (59\d|60\d) MB$", "took about 600 MB", what)] += count
        found.append((inputs, told))
    assert found == [*((2, {what: 2}) for what in BROKEN.values()), (2, {})]
    kept = {file.read_text() for file in (tmp_path / "failures").glob("own-*")}
    assert kept == set(BROKEN)


def test_changes_are_the_same_for_the_same_seed() -> None:
    seed = json.dumps({"a": [1, 2, {"b": None}], "c": "x"}).encode()
    for mutate in (fuzz_mutations.json_changed, fuzz_mutations.bytes_changed, fuzz_mutations.template_changed):
        first = [mutate(Random(number), seed, seed) for number in range(50)]
        assert first == [mutate(Random(number), seed, seed) for number in range(50)]
        assert len(set(first)) > 25
