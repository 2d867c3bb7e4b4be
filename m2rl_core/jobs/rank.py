"""One rank of a stage, as `launch` has accelerate start it: `python -m m2rl_core.jobs.rank FOLDER`.

It ends at once when its launcher has ended, or the process that asked for the stage: torch starts each rank in a session
of its own, which no signal to the launcher's reaches, and a killed launcher stops nobody.
"""
from __future__ import annotations

import os
import pickle
import sys
import threading
import time
import traceback
from pathlib import Path

from m2rl_core import ranks
from m2rl_core.jobs import launch
from m2rl_core.jobs.cluster import FINAL
from m2rl_core.run import Run

EVERY = 0.3  # seconds between two looks


def stay_with(parent: int, maker: str, folder: Path) -> None:
    """Let this process end when its parent is another one, `maker` is no more, or the launch is over."""
    def look() -> None:
        while os.getppid() == parent and launch.lives(maker) and folder.exists():
            time.sleep(EVERY)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()


def main(folder: Path, rank: str) -> int:
    """Make the stage that the folder names, with the others; an error is left there for the one who asked."""
    profile, root, source, jobs, name = pickle.loads((folder / launch.WORK).read_bytes())
    try:
        run = Run(profile, root, source)
        run.store.jobs = jobs
        run.need(name)
        return 0
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0]
        known = (type(error), text) if isinstance(error, FINAL) else (launch.RankFailed, f"{type(error).__name__}: {text}")
        (folder / f"{launch.ERROR}{rank}").write_bytes(pickle.dumps(known))
        traceback.print_exc()
        ranks.tell(error)
        return 2


if __name__ == "__main__":
    here, number = Path(sys.argv[1]), os.environ["RANK"]
    stay_with(os.getppid(), os.environ[launch.MAKER], here)
    (here / f"{launch.RANK}{number}").write_text(launch.who())
    ranks.leave(main(here, number))
