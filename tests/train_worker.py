"""Commands that two processes run together, for `test_train_processes.py`: each process is a fork of this one.

So torch is imported once, and no command finds what another left in its process. They find each other as torchrun would
have them do. The commands are JSON, `{NAME: words}`; the exit status and the words of each process are written to the
folder given. In a command whose name begins with "sigterm" the second process alone gets that signal, after step 3.
"""

import contextlib
import io
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

from torch.distributed.tensor import DTensor

from multimatrix import cli
from multimatrix.train import command  # noqa: F401
from multimatrix.train.recorder import Recorder
from multimatrix.train.trainer import PretrainingTrainer

PROCESSES = 2


def signal_after(step: int) -> None:
    on_log = Recorder.on_log

    def signalled(self, args, state, control, **words):
        on_log(self, args, state, control, **words)
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    Recorder.on_log = signalled


def run(folder: Path, name: str, words: list[str], rank: int) -> None:
    """One process of one command."""
    save, found = PretrainingTrainer._save_checkpoint, {}

    def look(self, *args):
        """Which share of the weights this process holds."""
        save(self, *args)
        parameters = list(self.unwrapped().parameters())
        local = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
        found["share"] = local / sum(p.numel() for p in parameters)

    PretrainingTrainer._save_checkpoint = look
    if name.startswith("sigterm") and rank == 1:
        signal_after(3)
    sys.argv = ["multimatrix", *words]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            cli.main()
            status = 0
        except SystemExit as exit_:
            status = exit_.code or 0
        except BaseException:
            traceback.print_exc()
            status = -1
    (folder / f"{name}-{rank}.json").write_text(json.dumps(found | {"status": status, "said": said.getvalue()}))


def main(folder: Path, commands: dict[str, list[str]]) -> None:
    for name, words in commands.items():
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(PROCESSES):
            if (child := os.fork()) == 0:
                numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "LOCAL_WORLD_SIZE": PROCESSES}
                os.environ |= {key: str(value) for key, value in numbers.items()}
                os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
                run(folder, name, words, rank)
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
