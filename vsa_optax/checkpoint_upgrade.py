"""Reads the manifest of an earlier release: some leaves were added to states since, and some scalars were packed."""

from collections.abc import Iterable
from typing import Any

from vsa_optax.checkpoint_leaves import Leaf, kind_of
from vsa_optax.prediction.machine_state import COUNTS, NUMBERS

Entries = dict[str, dict[str, Any]]

# Leaves that a release added to states, by the ends of their paths in a NamedTuple and in a dict, with their kinds.
_ADDED = {(".history.scales", "['history']['scales']"): "None"}
_FIRST = COUNTS[""][0]


def upgraded(entries: Entries, wanted: Iterable[Leaf]) -> Entries:
    """``entries`` as this release would have written them.

    Instead of a key, the entry of a packed array has the list of the keys of its scalars. A None in it stands for a
    scalar that did not exist when the checkpoint was made; it is restored as 0.

    Args:
        entries: the manifest's entries by path.
        wanted: the leaves of the template.
    """
    entries = dict(entries)
    for leaf in wanted:
        for joined in (".{}", "['{}']"):  # The names of fields, and the keys of a dict made of them.
            machine = leaf.path.removesuffix(joined.format("counts"))
            is_packed_since = machine != leaf.path and leaf.path not in entries
            if is_packed_since and machine + joined.format(_FIRST) in entries:
                entries = _packed(entries, machine, joined)
        entry = leaf._replace(key=None).entry()
        if leaf.path not in entries and any(leaf.path.endswith(e) and kind_of(entry) == k for e, k in _ADDED.items()):
            entries[leaf.path] = entry
    return entries


def _packed(entries: Entries, machine: str, joined: str) -> Entries:
    """``entries`` with the scalars of the machine at this path packed into arrays."""
    entries = dict(entries)

    def path_of(*names: str) -> str:
        return machine + "".join(joined.format(name) for name in names if name)

    # A part that the machine does not have is None, and one leaf.
    absent = {part for part in ("errors", "adaptive", "guard") if path_of(part) in entries}
    losses = entries.pop(path_of("adaptive", "" if "adaptive" in absent else "losses"))
    entries[path_of("losses")] = losses | {"path": path_of("losses")}
    for name, fields, dtype in (("counts", COUNTS, "int32"), ("numbers", NUMBERS, "float32")):
        scalars = [path_of(part, field) for part in fields if part not in absent for field in fields[part]]
        found = [entries.pop(path, {"key": None}) for path in scalars]
        entries[path_of(name)] = {
            "path": path_of(name),
            "key": [entry["key"] for entry in found],
            "shape": [len(found)],
            "dtype": dtype,
            "weak_type": False,
            "generator": None,
        }
    for part in absent - {"adaptive"}:
        del entries[path_of(part)]
    return entries
