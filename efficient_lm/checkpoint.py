"""Checkpoints of a training state: DIR/<step>, written by orbax, complete or not there at all.

The state is stored as a nested dict of plain arrays (names from tree paths, so optax classes don't matter), and
can be restored onto any mesh. Loading compares paths, shapes and dtypes first and says what does not fit.
"""

import shutil
from contextlib import contextmanager
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from efficient_lm import metrics
from efficient_lm.schema import ConfigError
from efficient_lm.sharding import path_of


def steps(directory) -> list[int]:
    """Steps of the complete checkpoints, rising."""
    directory = Path(directory)
    # orbax writes under a temporary name with a suffix and renames at the end.
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit()) if directory.is_dir() else []


def save(directory, step: int, state, keep: int = 0) -> None:
    """Write `state` as checkpoint `step` and delete all but the newest `keep` (0 = keep all)."""
    directory = Path(directory).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        for leftover in directory.glob("*tmp*"):
            shutil.rmtree(leftover, ignore_errors=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / str(step), _nest(state), force=True)
    if keep and jax.process_index() == 0:
        for old in steps(directory)[:-keep]:
            shutil.rmtree(directory / str(old))


def restore(directory, step: int, like=None):
    """The checkpoint `step` in the structure of `like`: arrays or ShapeDtypeStructs, whose shardings are used.

    Without `like` a nested dict of what is stored. Raises ConfigError, one line, when it has other paths, shapes or
    dtypes than `like`, or can't be read.
    """
    path = Path(directory).resolve() / str(step)
    if not path.is_dir():
        have = ", ".join(map(str, steps(directory))) or "none"
        raise ConfigError(f"checkpoint {step} in {directory}: no such checkpoint; there are: {have}")
    if like is None:
        with _readable(path), ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path)
    wanted = {path_of(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(like)}
    with _readable(path), ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path).item_metadata
        if metadata is None:
            raise ValueError("its metadata is missing or cut short")
        stored = {path_of(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(metadata.tree)}
        _verify(wanted, stored, path)
        target = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=getattr(a, "sharding", None)), _nest(like)
        )
        loaded = checkpointer.restore(path, target)
    loaded = {path_of(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(loaded)}
    return jax.tree_util.tree_map_with_path(lambda p, _: loaded[path_of(p)], like)


@contextmanager
def _readable(path):
    """Whatever orbax raises becomes one line that says what can be done."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        before = [step for step in steps(path.parent) if step < int(path.name)]
        rest = f"go on from step {before[-1]}" if before else "begin anew"
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(
            f"checkpoint {path}: can't be read ({reason}); if it is damaged, delete it to {rest}"
        ) from error


def _verify(wanted, stored, path):
    for name in sorted(wanted.keys() | stored.keys()):
        have, want = (
            f"{'x'.join(map(str, leaf.shape)) or 'scalar'} {leaf.dtype}" if leaf is not None else "nothing"
            for leaf in (stored.get(name), wanted.get(name))
        )
        if have != want:
            raise ConfigError(f"checkpoint {path}: {name} is {have} there, but the config needs {want}")


def _nest(tree):
    nested = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        *parents, last = path_of(key_path).split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return nested


def first_state(train, directory, like):
    """The last checkpoint in `directory`, else the one that `train` (TrainConfig) names in init_from, else None.

    Raises ConfigError where init_from has no such checkpoint, or steps of another number of tokens.
    """
    found = steps(directory)
    if found:
        return restore(directory, found[-1], like)
    if not train.init_from:
        return None
    trunk = Path(train.init_from)
    found = steps(trunk / "ckpt")
    step = train.init_step or (found[-1] if found else 0)
    if step not in found:
        have = ", ".join(map(str, found)) or "none"
        field, value = ("init_step", step) if train.init_step else ("init_from", str(trunk))
        raise ConfigError(f"config.train.{field} = {value!r}: no such checkpoint in {trunk}; there are: {have}")
    stored = (metrics.read_json(trunk / "config.json") or {}).get("train", {})
    there, here = stored.get("batch_size", 0) * stored.get("seq_len", 0), train.batch_size * train.seq_len
    if there and there != here:
        raise ConfigError(
            f"config.train.init_from = {str(trunk)!r}: has {there} tokens a step, and this config {here}: the tokens "
            f"and FLOPs of step {step} would be counted wrongly"
        )
    if step >= train.steps:
        raise ConfigError(f"config.train.steps = {train.steps}: must exceed the step of init_from, {step}")
    return restore(trunk / "ckpt", step, like)
