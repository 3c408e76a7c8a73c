"""Listing to sources: grouping by name alone, as the listing streams."""

from datetime import UTC, datetime

import pytest

from darnet.archive import Selection, batch_by, is_stray, list_sources, name_format
from darnet.errors import StorageError
from darnet.scan import Source, StoredObject


def _objects(*keys: str) -> list[StoredObject]:
    return [StoredObject(key, 1, "v") for key in sorted(keys, key=lambda key: key.encode())]


def _grouped(*keys: str) -> dict[str, list[str]]:
    return {source.key: [item.key for item in source.objects] for source in list_sources(_objects(*keys))}


def test_a_prefix_that_directly_holds_slices_is_one_source() -> None:
    assert _grouped("a/1.dcm", "a/2.dcm", "b/1.png") == {"a": ["a/1.dcm", "a/2.dcm"], "b": ["b/1.png"]}


def test_slices_around_a_subfolder_in_listing_order_stay_one_source() -> None:
    assert _grouped("a/1", "a/b/1", "a/b/2", "a/c") == {"a": ["a/1", "a/c"], "a/b": ["a/b/1", "a/b/2"]}


def test_a_sibling_whose_name_sorts_into_a_folder_does_not_split_it() -> None:
    assert _grouped("a/1", "a-b/1", "a.b/1", "a/2") == {"a-b": ["a-b/1"], "a.b": ["a.b/1"], "a": ["a/1", "a/2"]}


def test_each_volume_file_is_a_source_of_its_own() -> None:
    names = ["x/1.nii", "x/2.nii.gz", "x/3.nrrd", "x/4.MHA", "x/5.zip"]
    assert _grouped(*names, "x/6.dcm") == {name: [name] for name in names} | {"x": ["x/6.dcm"]}


def test_no_two_sources_of_a_bucket_have_one_key() -> None:
    """On S3 an object may be named like a prefix, and a prefix be a dot."""
    keys = [".//1.dcm", "./1.dcm", "2.dcm", "x.zip", "x.zip///1.dcm", "x.zip//1.dcm", "x.zip/1.dcm", "y.nii.gz/1.dcm"]
    found = list(list_sources(StoredObject(key, 1, "v") for key in keys))
    names = [".", "./", ".//", "x.zip", "x.zip/", "x.zip//", "x.zip///", "y.nii.gz/"]
    assert sorted(source.key for source in found) == names
    assert all(Selection(prefixes=("x.zip/",)).admits(source) for source in found if source.key == "x.zip/")


def test_slices_at_the_root_are_source_dot() -> None:
    assert _grouped("1.dcm", "2.dcm", "a/3.dcm") == {"a": ["a/3.dcm"], ".": ["1.dcm", "2.dcm"]}


def test_strays_make_no_source_and_join_none() -> None:
    assert _grouped("a/LICENSE", "a/SOURCES.md", "a/DICOMDIR") == {}
    assert _grouped("a/1.dcm", "a/notes.txt", "a/thumb.jpg", "a/.DS_Store") == {"a": ["a/1.dcm"]}


@pytest.mark.parametrize("key", ["a/IM0001", "a/1.2.840.113.259", "a/CT2_J2KR", "a/x.ima", "a/slice.tif"])
def test_names_that_slices_have_are_not_stray(key: str) -> None:
    assert not is_stray(key)


@pytest.mark.parametrize(
    "key",
    ["a/x.TXT", "a/.x.dcm", "a/", "a/__MACOSX/1.dcm", "a/b/preview1", "a/b/thumb.1.dcm", "a/LICENSE-2.0", "a/_SUCCESS"],
)
def test_names_that_no_slice_has_are_stray(key: str) -> None:
    assert is_stray(key)


def test_sources_come_while_the_listing_still_streams() -> None:
    def stream():  # type: ignore[no-untyped-def]
        yield from _objects("a/1", "b/1")
        raise RuntimeError("listed too far")

    sources = list_sources(stream())
    assert next(sources).key == "a"


def test_an_unsorted_listing_is_refused() -> None:
    """By its place: its key may name a patient."""
    with pytest.raises(StorageError, match="not sorted at its object 2; use a store that lists by the bytes") as caught:
        list(list_sources([StoredObject("b/1", 1, "v"), StoredObject("a-patient/1", 1, "v")]))
    assert "a-patient" not in str(caught.value)


def test_input_digest_changes_with_key_version_and_size_only() -> None:
    def digest(*objects: StoredObject) -> str:
        (source,) = list_sources(objects)
        return source.input_sha256

    base = digest(StoredObject("a/1", 1, "v", 5.0))
    assert base == digest(StoredObject("a/1", 1, "v", 6.0))
    others = [StoredObject("a/1", 2, "v"), StoredObject("a/1", 1, "w"), StoredObject("a/2", 1, "v")]
    assert len({base, *(digest(item) for item in others)}) == 4


def test_a_source_s_format_is_its_commonest_suffix() -> None:
    objects = [StoredObject(key, 1, "1") for key in ("s/1.PNG", "s/2.png", "s/thumb.jpg")]
    assert name_format(Source("s", tuple(objects))) == "png"
    for key, expected in (("a/x.nii.gz", "nii.gz"), ("a/1.2.840.113", "none"), ("a/IM01", "none"), ("a/b.DCM", "dcm")):
        assert name_format(Source(key, (StoredObject(key, 1, "1"),))) == expected


# Which of them a night looks at


def _source(key: str, modified_s: float = 0.0) -> Source:
    return Source(key, (StoredObject(f"{key}/1", 1, "v", modified_s - 5), StoredObject(f"{key}/2", 1, "v", modified_s)))


def test_prefixes_are_listed_in_order_and_none_twice() -> None:
    assert Selection().list_prefixes() == [""]
    prefixes = ("b", "a/2", "a/1", "a/10", "\U0001f600", "\uffee", "b")  # UTF-8 puts the last two the other way round
    assert Selection(prefixes).list_prefixes() == ["a/1", "a/2", "b", "\uffee", "\U0001f600"]
    assert Selection(("a", "", "b")).list_prefixes() == [""]


@pytest.mark.parametrize(
    ("prefixes", "admitted"),
    [
        ((), ["ct/1", "ct/10/x.nii", "mr/1", "."]),
        (("ct",), ["ct/1", "ct/10/x.nii"]),
        (("ct/1",), ["ct/1", "ct/10/x.nii"]),
        (("ct/1/",), ["ct/1"]),
        (("ct/10/x.nii",), ["ct/10/x.nii"]),
        (("ct/1/IM", "mr"), ["mr/1"]),  # lists a part of ct/1 only
    ],
)
def test_prefixes_admit_whole_sources_only(prefixes: tuple[str, ...], admitted: list[str]) -> None:
    sources = [_source(key) for key in ("ct/1", "ct/10/x.nii", "mr/1", ".")]
    assert [source.key for source in sources if Selection(prefixes).admits(source)] == admitted


def test_since_goes_by_the_newest_object() -> None:
    since = datetime(2026, 1, 1, tzinfo=UTC)
    ages_s = (since.timestamp() - 1, since.timestamp(), since.timestamp() + 1)
    assert [Selection(since=since).admits(_source("a", age_s)) for age_s in ages_s] == [False, True, True]


def test_a_pattern_is_matched_with_the_whole_key() -> None:
    keys = ["2026/01/a.nii", "2026/01/b", "2025/01/a.nii", "x/2026/01/b"]
    for glob, admitted in (("2026/*", keys[:2]), ("*.nii", [keys[0], keys[2]]), ("202[56]/?1/b", keys[1:2]), ("b", [])):
        assert [key for key in keys if Selection(glob=glob).admits(_source(key))] == admitted


def test_a_source_settles_by_its_newest_object() -> None:
    selection = Selection(settle_s=100)
    ages_s = [0.0, 99.0, 100.0, 1e6, -99.0, -300.0, -14 * 3600.0, -1e6]  # a clock ahead, a time zone, a wrong clock
    sources = [_source("a", 1e9 - age_s) for age_s in ages_s]
    assert [selection.is_arriving(source, 1e9) for source in sources] == [True, True, False, False, *[True] * 3, False]
    assert [selection.is_misdated(source, 1e9) for source in sources] == [*[False] * 7, True]
    assert not any(Selection().is_arriving(source, 1e9) or Selection().is_misdated(source, 1e9) for source in sources)


def test_batches_end_when_they_are_heavy_enough() -> None:
    assert list(batch_by([1, 2, 3, 9, 1], lambda item: item, 3)) == [[1, 2], [3], [9], [1]]
    assert list(batch_by([], lambda item: item, 3)) == []
