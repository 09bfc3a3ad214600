"""Classes by number or by name, those of ImageNet without its images."""

import difflib
import functools
import importlib.resources
from collections.abc import Sequence

from rae_jax import config as configs

_FEW = 50  # Classes that an error may list.
_SUGGESTED = 5


@functools.cache
def imagenet() -> dict[str, tuple[str, ...]]:
    """Returns the English names of the 1000 classes by WordNet id, in label order.

    The order is that of ILSVRC 2012, where a label is the rank of the class's id.
    """
    file = importlib.resources.files(__package__) / "imagenet_classes.txt"
    lines = file.read_text(encoding="utf-8").splitlines()
    pairs = (line.split(" ", 1) for line in lines)
    return {wnid: tuple(names.split(", ")) for wnid, names in pairs}


def names_of(class_names: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns all names of each class.

    Args:
        class_names: Those of a data set, or its numbers "0", "1" ... where the data
            is not here: 1000 of them are taken for ImageNet's. Folders of ImageNet,
            "n02099601", have its names beside their own.
    """
    known = imagenet()
    if list(class_names) == list(map(str, range(len(known)))):
        return [(*names, wnid) for wnid, names in known.items()]
    return [(*known.get(name, ()), name) for name in class_names]


def find(word: str, class_names: Sequence[str]) -> int:
    """Returns the label of a class.

    Args:
        word: The class's name in the data, its number, or one of `names_of` in
            capital or small letters.
        class_names: See `names_of`.

    Raises:
        ConfigError: There is no such class, or several have this name; names the
            candidates.
    """
    if word in class_names:
        return class_names.index(word)
    if word.isdecimal() and int(word) < len(class_names):
        return int(word)
    names = names_of(class_names)
    folded = word.casefold()
    found = [i for i, own in enumerate(names) if folded in map(str.casefold, own)]
    if len(found) > 1:
        raise configs.ConfigError(
            f"Several classes are called {word!r}; give the number of one: "
            f"{_listed(names, found)}."
        )
    if not found:
        raise configs.ConfigError(_unknown(word, names))
    return found[0]


def _unknown(word: str, names: Sequence[tuple[str, ...]]) -> str:
    if len(names) <= _FEW:
        return configs.suggest(word, [own[0] for own in names], "class")
    folded = word.casefold()
    labels = {name.casefold(): i for i, own in enumerate(names) for name in own}
    near = [name for name in labels if folded in name.split()]
    near += difflib.get_close_matches(folded, labels, n=_SUGGESTED, cutoff=0.7)
    chosen = list(dict.fromkeys(labels[name] for name in near))[:_SUGGESTED]
    hint = f" Did you mean {_listed(names, chosen)}?" if chosen else ""
    return (
        f"Unknown class {word!r}.{hint} Give a number from 0 to {len(names) - 1} or a "
        f"name such as {names[0][0]!r}."
    )


def _listed(names: Sequence[tuple[str, ...]], labels: Sequence[int]) -> str:
    known = imagenet()
    words = {i: [name for name in names[i] if name not in known] for i in labels}
    return ", ".join(f"{i} ({', '.join(words[i] or names[i])})" for i in labels)
