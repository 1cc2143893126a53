"""Claim: a clipped step takes no more time than in another version of jaxdp, nor memory.

    git worktree add /tmp/before COMMIT
    python bench/beside.py /tmp/before [--models mlp lstm] [--rounds N] [--scale N]

Two processes, one with the jaxdp beside this file and one with that of another working tree, take
turns on every model of `bench/zoo.py`: medians of the ratio of times within a round, which order
alternates, and the ratio of the memory that the compiled steps take beside their arguments: what
is temporary, and their results. The program that measures is this file for both. Written to
`bench/results/beside_<device>.json` for a run of all models.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

GOAL = 1.03
CLIPS = ("flat", "per_layer")


def serve() -> None:
    """Answers requests of lines of JSON: builds a step, or runs it for a turn."""
    import jax
    import timing
    import zoo

    import jaxdp

    run: Callable[[], None] | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if "model" in request:
            case = zoo.CASES[request["model"]](request["scale"])
            make = {"flat": jaxdp.clip_flat, "per_layer": jaxdp.clip_per_layer}[request["clip"]]
            clip, grads_fn = make(1.0), jaxdp.per_sample_grads(case.loss_fn)

            def step(params: Any, batch: Any, clip: Any = clip, grads_fn: Any = grads_fn) -> Any:
                return clip.update(grads_fn(params, batch), clip.init(params))[0].value

            compiled = jax.jit(step).lower(case.params, case.batch).compile()
            memory = compiled.memory_analysis()
            assert memory is not None
            answer["bytes"] = memory.temp_size_in_bytes + memory.output_size_in_bytes
            answer["device"] = jax.devices()[0].device_kind

            run = timing.waiting(compiled, case.params, case.batch)
            run()
        else:
            assert run is not None
            answer["seconds"] = timing.turn(run)
        print(json.dumps(answer), flush=True)


class Server(NamedTuple):
    """A process with one version of jaxdp."""

    process: subprocess.Popen[str]

    @classmethod
    def of(cls, tree: Path) -> "Server":
        """With the jaxdp in this working tree."""
        environment = {**os.environ, "PYTHONPATH": str(tree.resolve())}
        command = [sys.executable, __file__, "--serve"]
        pipe = subprocess.PIPE
        return cls(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment))

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to one request."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a process has ended before its answer; its error is above")
        return json.loads(line)


def measure(
    servers: list[Server], model: str, clip: str, rounds: int, scale: int
) -> dict[str, Any]:
    """Ratios of this version to the other: time and memory."""
    import timing

    built = [server.ask(model=model, clip=clip, scale=scale) for server in servers]
    seconds = timing.in_turns(
        {name: server.ask for name, server in zip(("this", "other"), servers, strict=True)},
        rounds,
        measure=lambda ask: ask()["seconds"],
    )
    pairs = zip(seconds["this"], seconds["other"], strict=True)
    low, median, high = timing.quartiles([this / other for this, other in pairs])
    here, there = (answer["bytes"] for answer in built)
    return {
        "device": built[0]["device"],
        "time": median,
        "time_quartiles": [low, high],
        "memory": here / there,
        "rounds": rounds,
    }


def main() -> None:
    """Measures, prints, and writes the figures."""
    if sys.argv[1:] == ["--serve"]:
        serve()
        return
    parser = argparse.ArgumentParser(description="clipped steps of two versions of jaxdp")
    parser.add_argument("other", type=Path, help="a working tree of the other version")
    parser.add_argument("--models", nargs="+", metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each version")
    parser.add_argument("--scale", type=int, default=1, help="factor of every batch size")
    options = parser.parse_args()
    import zoo

    servers = [Server.of(Path(__file__).parent.parent), Server.of(options.other)]
    results: dict[str, Any] = {}
    device = ""
    for name in options.models or zoo.CASES:
        results[name] = {}
        for clip in CLIPS:
            found = measure(servers, name, clip, options.rounds, options.scale)
            device = found.pop("device")
            results[name][clip] = found
            low, high = found["time_quartiles"]
            print(
                f"{name:28} {clip:10} time {found['time']:.3f} ({low:.3f} to {high:.3f}), "
                f"memory {found['memory']:.3f}",
                flush=True,
            )
    each = [found for model in results.values() for found in model.values()]
    for key in ("time", "memory"):
        print(f"{key}: geometric mean {statistics.geometric_mean(f[key] for f in each):.3f}")
    if not options.models:
        word = re.sub(r"[^a-z0-9]+", "_", device.lower())
        out = Path("bench/results") / f"beside_{word}.json"
        out.write_text(json.dumps({"goal": GOAL, "models": results}, indent=2) + "\n")
        print(f"wrote {out}")
    for server in servers:
        server.process.terminate()


if __name__ == "__main__":
    main()
