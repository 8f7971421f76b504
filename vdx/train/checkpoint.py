"""Checkpoints by Orbax: the state, the position in the data, and nothing else.

A step holds three items: `ema` (all that sampling needs), `state` (the rest of TrainState) and
`data` (a JSON integer). Saves run in the background; `close` waits for them.
"""

from pathlib import Path

import jax
import orbax.checkpoint as ocp

from vdx.train.state import TrainState
from vdx.types import Params


class Checkpoints:
    """The checkpoints under `<workdir>/checkpoints`; keeps the newest `keep`."""

    def __init__(self, workdir: Path, keep: int = 2):
        self.path = Path(workdir).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self.manager = ocp.CheckpointManager(self.path, options=options)

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def save(self, step: int, state: TrainState, position: int) -> None:
        """Raises RuntimeError if Orbax declines: a save that was due must happen."""
        done = self.manager.save(step, args=ocp.args.Composite(
            ema=ocp.args.StandardSave(state.ema),
            state=ocp.args.StandardSave(_without_ema(state)),
            data=ocp.args.JsonSave({"position": position})), force=True)
        if not done:
            raise RuntimeError(f"Orbax did not save step {step}; newest is {self.latest()}.")

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, int]:
        """(state, position) of a step, default the newest. `like` is abstract, with shardings."""
        step = self.newest() if step is None else step
        out = self.manager.restore(step, args=ocp.args.Composite(
            ema=ocp.args.StandardRestore(like.ema),
            state=ocp.args.StandardRestore(_without_ema(like)),
            data=ocp.args.JsonRestore()))
        check_concrete(out)
        return like.replace(ema=out["ema"], **out["state"]), int(out["data"]["position"])

    def restore_ema(self, like: Params, step: int | None = None) -> Params:
        """The averaged parameters alone, for sampling."""
        step = self.newest() if step is None else step
        out = self.manager.restore(step, args=ocp.args.Composite(
            ema=ocp.args.StandardRestore(like)))
        check_concrete(out)
        return out["ema"]

    def newest(self) -> int:
        step = self.latest()
        if step is None:
            raise FileNotFoundError(f"No checkpoint in {self.path}. Train there first: "
                                    "python -m vdx.main --config=... --workdir=...")
        return step

    def close(self) -> None:
        """Waits for pending saves; their errors are raised here."""
        self.manager.wait_until_finished()
        self.manager.close()


def _without_ema(state: TrainState) -> dict:
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state,
            "key": state.key}


def check_concrete(restored) -> None:
    """Orbax leaves what is missing on disk abstract, without a word."""
    leaves = jax.tree_util.tree_leaves_with_path(restored.items() if hasattr(restored, "items")
                                                 else restored)
    missing = [jax.tree_util.keystr(path) for path, leaf in leaves
               if isinstance(leaf, jax.ShapeDtypeStruct)]
    if missing:
        raise ValueError(f"The checkpoint lacks {len(missing)} arrays: {', '.join(missing[:10])}")
