"""Classes of ImageNet by name, without its images."""

import configparser
import fnmatch
import re
from pathlib import Path

import pytest

from rae_jax import config as configs
from rae_jax.data import class_names

ROOT = Path(__file__).parent.parent
NUMBERS = tuple(map(str, range(1000)))


def test_every_class_has_an_id_and_names():
    known = class_names.imagenet()
    ids = list(known)
    assert len(ids) == 1000 and ids == sorted(ids)  # Labels are ranks of ids.
    assert all(re.fullmatch(r"n\d{8}", wnid) for wnid in ids)
    for names in known.values():
        assert names and all(name == name.strip() != "" for name in names)
        assert len({name.casefold() for name in names}) == len(names)


@pytest.mark.parametrize(
    ("label", "names"),
    [
        (0, ["tench", "Tench", "n01440764", "0"]),
        (207, ["golden retriever", "GOLDEN RETRIEVER"]),
        (360, ["otter"]),
        (388, ["giant panda"]),
        (417, ["balloon"]),
        (817, ["sports car"]),
        (980, ["volcano"]),
        (999, ["toilet tissue", "toilet paper"]),
    ],
)
def test_names_of_models_without_data(label, names):
    for name in names:
        assert class_names.find(name, NUMBERS) == label


def test_names_of_folders():
    """Also of some of ImageNet's classes; the data's own names come first."""
    folders = ("n02099601", "mine", "n02007558", "7", "Flamingo")
    found = [class_names.find(w, folders) for w in ("Golden Retriever", "n02007558")]
    assert found == [0, 2]
    assert class_names.find("7", folders) == 3 and class_names.find("1", folders) == 1
    assert class_names.find("Flamingo", folders) == 4
    with pytest.raises(configs.ConfigError, match=r"2 \(flamingo.*4 \(Flamingo\)"):
        class_names.find("flamingo", folders)
    with pytest.raises(configs.ConfigError, match="Unknown class 'tench'"):
        class_names.find("tench", tuple(map(str, range(10))))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("crane", r"134 \(crane, crane bird\), 517 \(crane, construction crane\)"),
        ("Missile", r"657 \(missile\), 744 \(projectile, missile\)"),
        ("maillot", r"638 \(maillot\), 639 \(maillot, tank suit\)"),
        ("golden retreiver", r"Did you mean 207 \(golden retriever\)"),
        ("retriever", r"Did you mean .*205 \(flat-coated retriever\)"),
        ("1000", "Unknown class '1000'. Give a number from 0 to 999"),
    ],
)
def test_names_that_do_not_tell_one_class(word, message):
    with pytest.raises(configs.ConfigError, match=message):
        class_names.find(word, NUMBERS)


def test_data_files_travel_with_the_package():
    """Every file that is not Python is named in setup.cfg."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    given = dict(setup["options.package_data"])
    package = ROOT / "rae_jax"
    for path in package.rglob("*"):
        if path.is_dir() or path.suffix in (".py", ".pyc"):
            continue
        folder = ".".join(path.parent.relative_to(ROOT).parts)
        patterns = given.get(folder, "").split()
        assert any(fnmatch.fnmatch(path.name, p) for p in patterns), path
