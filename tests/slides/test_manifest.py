"""Data sets: manifests of many forms, folders, single slides, and all of their errors."""

import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from wsiflow.errors import EnvironmentFault, InputError, WsiflowError
from wsiflow.slides import content, dicom
from wsiflow.slides.kinds import (
    FLAT,
    RECORDED,
    DatasetParams,
    FolderSlides,
    GivenSlides,
    ManifestSlides,
    SingleSlide,
    SyntheticSlides,
    source_of,
)
from wsiflow.slides.manifest import (
    LABELS,
    Case,
    find_dataset,
    load_dataset,
    read_columns,
    read_folder,
    read_manifest,
    read_single,
)
from wsiflow.slides.names import slide_id
from wsiflow.slides.slide import open_slide
from wsiflow.slides.typed_paths import located


def manifest(folder: Path, text: str | bytes) -> Path:
    """Write a manifest and the files that it may name."""
    path = folder / "manifest.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for name in ("t.xml", "m.tif"):
        (folder / name).touch()
    return path


def problems_of(folder: Path, text: str) -> str:
    """Return the message with which a manifest is refused."""
    with pytest.raises(InputError) as caught:
        read_manifest(manifest(folder, text))
    return str(caught.value)


def test_every_column_is_read(tmp_path: Path) -> None:
    """Paths are relative to the manifest, and the slide itself need not exist."""
    header = "slide_id,path,mpp,label,annotation_path,mask_path,patient_id,split,scanner,sha256"
    path = manifest(tmp_path, f"{header}\nT1,wsi/a.svs,0.25,tumor,t.xml,m.tif,P1,test,Aperio,{'AB' * 32}\n")
    assert read_manifest(path) == (
        Case(
            "T1",
            tmp_path / "wsi/a.svs",
            mpp=0.25,
            label=1,
            annotation_path=tmp_path / "t.xml",
            mask_path=tmp_path / "m.tif",
            patient_id="P1",
            split="test",
            scanner="Aperio",
            sha256="ab" * 32,
            line=2,
        ),
    )


@pytest.mark.parametrize(
    ("header", "line"),
    [
        ("wsi,mpp", "a.svs,0.5"),
        ("sample_id,image_path,truth_mask_path,spacing_at_level_0", "a,a.svs,m.tif,0.5"),
        ("slide,patient,path,mpp", "a,P1,a.svs,0.5"),
        ("Slide_ID , PATH, MPP", "a, a.svs , 0.5"),
    ],
    ids=["trident", "hs2p", "slideflow", "capitals-and-blanks"],
)
def test_the_dialects_of_neighbouring_tools_are_read(tmp_path: Path, header: str, line: str) -> None:
    """The column names of other tools are recognised; without an id the file name is the id."""
    (case,) = read_manifest(manifest(tmp_path, f"{header}\n{line}\n"))
    assert (case.slide_id, case.path, case.mpp) == ("a", tmp_path / "a.svs", 0.5)


def test_the_label_table_of_camelyon_is_a_manifest(shared_data: Path) -> None:
    """Its 399 slides have the labels of their type; the class of the lesions is ignored."""
    cases = read_manifest(shared_data / "camelyon16" / "tables" / "reference.csv")
    assert len(cases) == 399
    assert {case.slide_id: case.label for case in cases}["tumor_001"] == 1
    assert sum(case.label == 1 for case in cases) == 160
    assert {case.scanner for case in cases} == {"0", "1"}


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbfslide_id,path\na,a.svs\n",
        b"slide_id,path\r\na,a.svs\r\n",
        b'"slide_id","path"\n"a","a.svs"\n',
        b"slide_id,path\n\n,\na,a.svs\n\n",
        b"slide_id,path\na,a.svs",
        "slide_id\tpath\r\na\ta.svs\r\n".encode("utf-16"),
    ],
    ids=["byte-order-mark", "crlf", "quotes", "blank-lines", "no-last-line-end", "utf-16"],
)
def test_what_spreadsheets_write_is_read(tmp_path: Path, text: bytes) -> None:
    """Byte order marks, line ends, quotes and blank lines do not matter."""
    (case,) = read_manifest(manifest(tmp_path, text))
    assert (case.slide_id, case.path) == ("a", tmp_path / "a.svs")


def test_a_quoted_field_may_hold_a_comma(tmp_path: Path) -> None:
    """A comma in a quoted file name is part of it."""
    (case,) = read_manifest(manifest(tmp_path, 'slide_id,path\na,"x, y.svs"\n'))
    assert case.path.name == "x, y.svs"


@pytest.mark.parametrize(
    "text",
    [
        "slide_id;path;mpp;label\na;a.svs;0,25;1\n",
        "slide_id\tpath\tmpp\tlabel\na\ta.svs\t0.25\tTRUE\n",
        "sep=;\r\nslide_id;path;mpp;label\r\na;a.svs;0,25;WAHR\r\n",
        "slide_id,path,mpp,label,,\na,a.svs,0.25,malignant,,\n",
        "slide_id,path,mpp,label,,\na,a.svs,0.25,1.0\n",
        ",slide_id,path,mpp,label\n0,a,a.svs,0.25,1\n",
        "Slide ID,Path,MPP,Label,patient-id,sha256\na,a.svs,0.25,Positive,N/A,n/a\n",
    ],
    ids=["semicolons", "tabs", "sep", "trailing-columns", "short-lines", "line-numbers", "blanks-in-names"],
)
def test_the_manifest_of_a_spreadsheet_is_read(tmp_path: Path, text: str) -> None:
    """Separators, decimal commas, columns without a name, and numbers of lines do not matter."""
    assert read_manifest(manifest(tmp_path, text)) == (
        Case("a", tmp_path / "a.svs", mpp=0.25, label=1, line=text.count("\n")),
    )


@pytest.mark.parametrize("word", ["N/A", "NA", "nan", "-", "?", "unknown", "None", "#N/A"])
def test_what_is_not_known_is_no_value(tmp_path: Path, word: str) -> None:
    """Slides of unknown patients are not all of one patient."""
    text = f"path,label,mpp,annotation_path,patient_id,scanner\na.svs,{word},{word},{word},{word},\n"
    assert read_manifest(manifest(tmp_path, text)) == (Case("a", tmp_path / "a.svs", line=2),)


def test_further_columns_are_kept(tmp_path: Path) -> None:
    """They can be made subgroups of; the first lines of a run name them."""
    path = manifest(tmp_path, "path,site,Stain,age,HER2\na.svs,B,H&E,-7.5,+\nb.svs,,IHC,,-\n")
    cases = read_manifest(path)
    assert cases[0].columns == (("site", "B"), ("stain", "H&E"), ("age", "-7.5"), ("her2", "+"))
    found = find_dataset(ManifestSlides(kind="manifest", manifest=path, limit=None))
    assert found.remarks == ("further columns of the manifest are kept, for --subgroups: site, stain, age, her2",)
    assert read_columns(path)["stain"] == {"a": "H&E", "b": "IHC"}


@pytest.mark.parametrize("name", ["anotation_path", "labels", "patientid", "mask_pth", "scaner", "spliit"])
def test_a_misspelt_column_is_not_taken_for_a_further_one(tmp_path: Path, name: str) -> None:
    """Truth would be left out silently."""
    assert "did you mean" in problems_of(tmp_path, f"path,{name}\na.svs,x\n")


@pytest.mark.parametrize(
    "name", ["site", "stain", "age", "stage", "grade", "case", "sex", "block", "scanner_id", "class"]
)
def test_an_ordinary_column_is_not_taken_for_a_misspelt_one(tmp_path: Path, name: str) -> None:
    """Names that happen to be like those of known columns are kept."""
    if name not in {"case", "class"}:
        assert read_manifest(manifest(tmp_path, f"path,{name}\na.svs,x\n"))[0].columns == ((name, "x"),)
    assert read_manifest(manifest(tmp_path, f"path,type,{name},case_id\na.svs,1,x,p\n"))[0].columns == ((name, "x"),)


def test_a_file_that_is_listed_twice_without_truth_is_told(tmp_path: Path) -> None:
    """It costs its time twice and counts in no score."""
    path = manifest(tmp_path, "slide_id,path\na,m.tif\nb,m.tif\n")
    found = find_dataset(ManifestSlides(kind="manifest", manifest=path, limit=None))
    assert found.remarks == ("line 3: m.tif is the same file as in line 2",)


def test_paths_are_read_as_people_write_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home folder, quotes, backslashes, and an address of this machine; a file with such a name comes first."""
    monkeypatch.setenv("HOME", str(tmp_path / "jörg"))
    (tmp_path / "sub").mkdir()
    for name in ("sub/a.svs", "~x.svs", "b\\c.svs"):
        (tmp_path / name).touch()
    given = {
        "~/s.svs": tmp_path / "jörg/s.svs",
        "sub\\a.svs": tmp_path / "sub/a.svs",
        "'sub/a.svs'": tmp_path / "sub/a.svs",
        f"file://{tmp_path}/a%20b.svs": tmp_path / "a b.svs",
        "~x.svs": tmp_path / "~x.svs",
        "b\\c.svs": tmp_path / "b\\c.svs",
        "sub/é (1), 100 % #2 = a.svs": tmp_path / "sub/é (1), 100 % #2 = a.svs",
    }
    for text, path in given.items():
        assert located(text, tmp_path) == path


@pytest.mark.parametrize("word", LABELS)
def test_label_words(tmp_path: Path, word: str) -> None:
    """Each word is recognised in any case; an empty cell is no label."""
    labels = [case.label for case in read_manifest(manifest(tmp_path, f"path,label\na.svs,{word.upper()}\nb.svs,\n"))]
    assert labels == [LABELS[word], None]


def test_all_errors_are_reported_together(tmp_path: Path) -> None:
    """One message names every wrong line, and no other."""
    message = problems_of(
        tmp_path,
        "slide_id,path,mpp,label,annotation_path,sha256\n"
        "a,a.svs,0.25,1,,\n"
        'b,b.svs,"0,2,5",maybe,,\n'
        "A,c.svs,-1,,gone.xml,12\n"
        "A,c.svs,,,,\n"
        "d,d.svs\n"
        "../e,e.svs,0,,,\n"
        "f,,,,,\n",
    )
    assert "\n" not in message
    assert "10 errors" in message
    for part in (
        "line 3: mpp: '0,2,5' is not a number (write 0.25)",
        "line 3: label: 'maybe' is not one of 0, normal",
        "line 4: mpp: '-1' is not a positive number",
        "line 4: annotation_path: 'gone.xml' is not an existing file",
        "line 4: sha256: '12' is not 64",
        "line 4: slide_id 'A' repeats 'a' of line 2",
        "line 5: slide_id 'A' repeats 'a' of line 2",
        "line 6: it has 2 cells, but the header has 6",
        "line 7: mpp: '0' is not a positive number",
        "line 8: the path is empty",
    ):
        assert part in message
    assert "line 2:" not in message


def test_every_error_of_a_long_list_is_reported(tmp_path: Path) -> None:
    """All wrong lines are reported at once, so that a manifest can be corrected in one pass."""
    message = problems_of(tmp_path, "path,mpp\n" + "".join(f"s{k}.svs,x\n" for k in range(1000)))
    assert "1000 errors" in message
    assert all(f"line {k + 2}: mpp" in message for k in range(1000))


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "the manifest is empty"),
        ("slide_id,path\n", "there is a header, but no line with a slide"),
        ("slide_id,mpp\na,1\n", "there is no column path, the first line is 'slide_id,mpp'"),
        ("a.svs,tumor\nb.svs,normal\n", "the first line is 'a.svs,tumor'; give it a header"),
        ("slide_id,path,lable\na,a.svs,1\n", r"unknown column 'lable' \(did you mean label\?\)"),
        ("path,wsi\na,b\n", "columns path, wsi all mean path"),
        ("slide_id,path,,\na,a.svs,,\nb,b.svs,,x\n", "line 3: column 4 has 'x' here, but no name in the header"),
        ("path,stain,STAIN\na,b,c\n", "columns stain, stain all mean stain"),
        ("path,mask_path\na.svs," + "a" * 300 + "\n", "line 2: mask_path: 'a*' is not an existing file"),
        ("path\nfile://server/a.svs\n", "line 2: path: 'file:.*' is a file of the machine 'server'; write the path"),
        ("path\nfile://[server/a.svs\n", r"line 2: path: 'file:.*' is no address of a file"),
        ("path\nC:\\slides\\a.svs\n", r"line 2: path: 'C:.*' is a path of Windows; write the path .* this machine"),
        ('path\n"\\\\server\\x\\a.svs"\n', r"line 2: path: .* is a path of Windows"),
        ("path\nhttps://x.org/a.svs\n", "line 2: path: 'https://x.org/a.svs' is an address; copy the file"),
        ("path\ns3://bucket/a.svs\n", "line 2: path: .* is an address"),
        ("path\nnan\n", "line 2: path: 'nan' is no path"),
        ("path\n$HOME/a.svs\n", "line 2: path: .* begins with a variable"),
        ("path,mask_path\na.svs,https://x.org/m.png\n", "line 2: mask_path: .* is an address"),
        ("slide_id,path\na,=cmd()\n", "line 2: path: '=cmd.*formula"),
        ("slide_id,path\na,\ta.svs\n", "line 2: path: .*formula"),
        ("slide_id,path,scanner\na,a.svs,@x\n", "line 2: scanner: '@x' begins"),
        ("slide_id,path\na,a\x00.svs\n", "line 2: path: .*control character"),
        ('slide_id,path\na,"a.svs\n', "line 2 is not CSV"),
        ("path,label\nm.tif,1\n./m.tif,0\n", "line 3: m.tif is the same file as in line 2, and would count twice"),
    ],
)
def test_a_wrong_manifest_is_refused(tmp_path: Path, text: str, cause: str) -> None:
    """Every error of the text is reported with its place."""
    with pytest.raises(InputError, match=cause) as caught:
        read_manifest(manifest(tmp_path, text))
    assert caught.value.exit_code == 20


def test_an_unreadable_manifest_is_refused(tmp_path: Path) -> None:
    """A missing file, a folder and another encoding have different messages."""
    with pytest.raises(InputError, match=r"the manifest cannot be read \(No such file"):
        read_manifest(tmp_path / "none.csv")
    with pytest.raises(InputError, match=r"the manifest cannot be read \(Is a directory"):
        read_manifest(tmp_path)
    with pytest.raises(InputError, match="it is a workbook of a spreadsheet program, not CSV; save it as 'CSV UTF-8'"):
        read_manifest(manifest(tmp_path, b"PK\x03\x04\x14\x00"))
    with pytest.raises(InputError, match="not UTF-8"):
        read_manifest(manifest(tmp_path, "path\nä.svs\n".encode("latin-1")))


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".a",
        "_a",
        "../a",
        "a/b",
        "a\\b",
        "a$b",
        "a*",
        "a" * 101,
        "é",
        "a\u200b",
        "a\u00a0b",
        "日本",
        "🔬",
        "H23/12-1A",
    ],
)
def test_a_name_that_is_no_safe_file_name_is_escaped(tmp_path: Path, name: str) -> None:
    """Output files are named after slides, so ids are safe and differ where names do; the name is kept."""
    cases = read_manifest(manifest(tmp_path, f"slide_id,path\n{name},a.svs\n{name}_,b.svs\n"))
    assert [case.name for case in cases] == [name, f"{name}_"]
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,99}", case.slide_id) for case in cases)
    assert cases[0].slide_id != cases[1].slide_id


def test_an_escaped_name_is_the_same_on_every_file_system() -> None:
    """Some file systems write letters and accents apart; the id is still readable."""
    assert slide_id("Fälle 1") == slide_id("Fa\u0308lle 1") == "Falle 1-8a9754"
    assert slide_id("Falle 1") == "Falle 1"


@pytest.mark.parametrize("slide_id", ["a", "7", "tumor_001", "S 1.2-b", "a" * 100])
def test_ordinary_names_are_slide_ids(tmp_path: Path, slide_id: str) -> None:
    """Letters, digits, periods, dashes and blanks are accepted unchanged."""
    (case,) = read_manifest(manifest(tmp_path, f"slide_id,path\n{slide_id},a.svs\n"))
    assert case.slide_id == slide_id


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    """Create a folder of files as users keep them."""
    for name in (
        "b.SVS",
        "a.tif",
        "a.xml",
        "deep/c.mrxs",
        "deep/c/Dat_0.dat",
        "c.xml",
        "dicom/1.dcm",
        "dicom/2.dcm",
        "lone/x.dcm",
        "notes.txt",
        ".hidden/d.svs",
        "._a.svs",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_a_folder_is_searched_by_extension(slides: Path) -> None:
    """Slides are sorted by path; the DICOM files of a folder are one slide; hidden files are ignored."""
    found = [(case.slide_id, case.path.relative_to(slides).as_posix()) for case in read_folder(slides)]
    assert found == [
        ("a", "a.tif"),
        ("b", "b.SVS"),
        ("c", "deep/c.mrxs"),
        ("dicom", "dicom/1.dcm"),
        ("x", "lone/x.dcm"),
    ]


def test_annotations_beside_a_slide_or_on_top_are_found(slides: Path) -> None:
    """The file with the name of the slide is its annotation; the other slides have none."""
    found = {case.slide_id: case.annotation_path for case in read_folder(slides)}
    assert found == {"a": slides / "a.xml", "b": None, "c": slides / "c.xml", "dicom": None, "x": None}


def rejection(path: Path) -> str:
    """Return why a file cannot be opened as a slide."""
    with pytest.raises(WsiflowError) as caught:
        open_slide(path, slide_id="s")
    return str(caught.value)


def test_every_file_named_like_a_slide_is_one(tmp_path: Path) -> None:
    """Broken links, special files and folders are not slides, and each is rejected with its name."""
    (tmp_path / "nowhere.svs").symlink_to("gone.svs")
    (tmp_path / "itself.svs").symlink_to("itself.svs")
    (tmp_path / "folder.svs").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/to_folder.svs").symlink_to(tmp_path / "outside")
    (tmp_path / "data/up.svs").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.tif")
    (tmp_path / "empty.tif").touch()
    (tmp_path / "set.dcm").mkdir()
    (tmp_path / "set.dcm/1.dcm").touch()
    found = {case.slide_id: case.path for case in read_folder(tmp_path)}
    assert sorted(found) == ["1", "empty", "folder", "itself", "nowhere", "pipe", "to_folder", "up"]
    assert "broken link (gone.svs)" in rejection(found["nowhere"])
    assert "broken link" in rejection(found["itself"])
    assert "not a regular file" in rejection(found["pipe"])
    for name in ("folder", "to_folder", "up"):
        assert "is a folder" in rejection(found[name])


def test_an_annotation_that_cannot_be_read_is_still_the_slides(tmp_path: Path) -> None:
    """A broken link still counts as an annotation, and so does an extension in upper case."""
    for name in ("a.tif", "b.tif", "b.XML"):
        (tmp_path / name).touch()
    (tmp_path / "a.xml").symlink_to("gone.xml")
    found = [case.annotation_path for case in read_folder(tmp_path)]
    assert found == [tmp_path / "a.xml", tmp_path / "b.XML"]


def test_links_to_folders_are_followed_to_each_folder_once(tmp_path: Path) -> None:
    """Slides behind a link are included; loops end, and slides within the folder keep their own path."""
    for name in ("other/far.tif", "slides/b/near.tif", "other/deep/far2.tif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name, target in {"a": "b", "loop": ".", "b/up": "../..", "c": "../other", "d": "../other"}.items():
        (tmp_path / "slides" / name).symlink_to(target)
    (tmp_path / "other/back").symlink_to(tmp_path / "slides")
    found = [case.path.relative_to(tmp_path / "slides").as_posix() for case in read_folder(tmp_path / "slides")]
    assert found == ["b/near.tif", "c/deep/far2.tif", "c/far.tif"]


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_one_file_under_two_names_is_refused(tmp_path: Path, link: Callable[[Path, Path], None]) -> None:
    """The slide would count twice in the scores; a manifest can list it twice on purpose."""
    (tmp_path / "a.tif").touch()
    link(tmp_path / "a.tif", tmp_path / "b.tif")
    with pytest.raises(InputError, match=r"1 error: b\.tif is the same file as a\.tif; .*manifest"):
        read_folder(tmp_path)


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    """Disks that were written in another encoding have such names, which no receipt could hold."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/Sch\xf6n.tif"))
    path.touch()
    with pytest.raises(InputError, match=r"the names of 1 slides are no UTF-8 text \(Sch\\xf6n\.tif\); rename them"):
        read_folder(tmp_path)
    with pytest.raises(ValidationError, match=r"the name is no UTF-8 text \(.*Sch\\xf6n\.tif\), rename it"):
        SingleSlide(kind="single", path=path, limit=None, mpp=None)


def test_a_folder_that_cannot_be_listed_is_reported(tmp_path: Path, monkeypatch) -> None:
    """The slides of such a folder would be left out silently, so it is named, with exit code 30."""
    for name in ("a.tif", "shut/b.tif", "open/too/c.tif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    listed = os.scandir

    def scandir(path: Path) -> object:
        if Path(path).name in {"shut", "too"}:
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(EnvironmentFault, match=r"shut \(Permission denied\)") as caught:
        read_folder(tmp_path)
    assert "open/too (Permission denied)" in str(caught.value)
    assert caught.value.exit_code == 30


def test_names_that_collide_get_their_folders(slides: Path) -> None:
    """Files of one name, ignoring case, are named after their folders too, then after their extensions."""
    for name in ("deep/A.svs", "ü, (1) = 100 %.svs", "x/s.tif", "y/s.tif", "y/s.svs", "s.xml", "x/s.xml"):
        (slides / name).parent.mkdir(exist_ok=True)
        (slides / name).touch()
    cases = {case.path.relative_to(slides).as_posix(): case for case in read_folder(slides)}
    ids = {path: case.slide_id for path, case in cases.items()}
    assert (ids["a.tif"], ids["deep/A.svs"]) == ("a", "deep_A")
    assert [ids[f"{path}"] for path in ("x/s.tif", "y/s.tif", "y/s.svs")] == ["x_s.tif", "y_s.tif", "y_s.svs"]
    assert cases["ü, (1) = 100 %.svs"].name == "ü, (1) = 100 %"
    assert ids["ü, (1) = 100 %.svs"].startswith("u_ _1_ _ 100")
    truth = {path: case.annotation_path for path, case in cases.items()}
    assert truth["y/s.tif"] is None, "s.xml on top may belong to any of the three"
    assert truth["x/s.tif"] == slides / "x/s.xml"
    remarks = find_dataset(FolderSlides(kind="folder", folder=slides, limit=None)).remarks
    listed = "x/s.tif, y/s.svs, y/s.tif"
    assert f"{listed}: if files of one name are one slide, remove all but one, or it counts twice" in remarks
    assert f"s.xml may belong to each of {listed}, and is not used: put it beside its slide" in remarks


def test_names_that_collide_in_a_manifest_get_their_folders(tmp_path: Path) -> None:
    """Slides without an id differ from each other, and from the ids that are given."""
    cases = read_manifest(manifest(tmp_path, "slide_id,path\n,p/a/s.svs\n,p/b/s.svs\ns2,c.svs\n,d/s2.svs\n"))
    assert [case.slide_id for case in cases] == ["a_s", "b_s", "s2", "d_s2"]


@pytest.mark.parametrize(
    "name",
    [
        *("a_mask.tif", "A_Mask.TIF", "a-mask.tiff", "a_evaluation_mask.tif", "mask_a.tif", "masks/a.tif"),
        *("m/a_mask.tif", "a_tissue.tif", "a_ground_truth.tif", "a.mask.tif", "Ground Truth/a.tif", "a_thumbnail.tif"),
    ],
)
def test_a_mask_beside_a_slide_is_no_slide(tmp_path: Path, name: str) -> None:
    """It is named with the slide it belongs to, and no truth: it may be of tissue."""
    for file in ("a.tif", "b_tissue.tif", "a_2.tif", name):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    found = find_dataset(FolderSlides(kind="folder", folder=tmp_path, limit=None))
    assert [case.slide_id for case in found.cases] == ["a", "a_2", "b_tissue"]
    assert {case.mask_path for case in found.cases} == {None}
    first, second, *rest = found.describe(tmp_path)
    assert first == f"slides     4 found in {tmp_path}, 1 of them skipped"
    assert second == f"skipped: {name}: named like a mask or another picture of a.tif"
    assert "mask_path" in rest[0]


def test_what_is_passed_over_is_counted_by_its_kind(slides: Path) -> None:
    """Files of a slide and its annotation are not; links that lead nowhere are named."""
    for name in ("1.png", "2.PNG", "readme", "other.xml"):
        (slides / name).touch()
    (slides / "cases").symlink_to("/mnt/gone")
    (slides / "link").symlink_to("gone.svs")
    found = find_dataset(FolderSlides(kind="folder", folder=slides, limit=2))
    assert found.describe(slides) == [
        f"slides     6 found in {slides}, 4 of them skipped",
        "skipped: 4 beyond dataset.limit=2",
        "5 files passed over (.png 2, .txt 1, .xml 1, without an extension 1)",
        "the link cases leads nowhere (/mnt/gone)",
    ]


def test_files_within_an_image_are_no_slides(slides: Path) -> None:
    """OME-Zarr is one image in a folder of thousands of files."""
    (slides / "img.zarr/0").mkdir(parents=True)
    (slides / "img.zarr/0/1.tif").touch()
    found = find_dataset(FolderSlides(kind="folder", folder=slides, limit=None))
    assert "1" not in {case.slide_id for case in found.cases}
    assert ".zarray" not in str(found.remarks)


def dicom_file(path: Path, series: str, *, explicit: bool = True, sop_class: str = dicom.WHOLE_SLIDE) -> Path:
    """Write the header of a DICOM file, with a sequence of undefined length before its series."""

    def element(group: int, number: int, kind: bytes, value: bytes, length: int | None = None) -> bytes:
        size = len(value) if length is None else length
        tag = struct.pack("<HH", group, number)
        if group != 2 and not explicit:
            return tag + struct.pack("<I", size) + value
        long = kind in {b"SQ", b"OB"}
        return tag + kind + (struct.pack("<HI", 0, size) if long else struct.pack("<H", size)) + value

    def uid(text: str) -> bytes:
        return text.encode() + b"\0" * (len(text) % 2)

    syntax = "1.2.840.10008.1.2.1" if explicit else "1.2.840.10008.1.2"
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF) + element(0x0008, 0x1150, b"UI", uid("1.2"))
    item += struct.pack("<HHI", 0xFFFE, 0xE00D, 0) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    data = element(0x0002, 0x0010, b"UI", uid(syntax)) + element(0x0008, 0x0016, b"UI", uid(sop_class))
    data += element(0x0008, 0x1140, b"SQ", item, 0xFFFFFFFF) + element(0x0020, 0x000E, b"UI", uid(series))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(128) + b"DICM" + data + element(0x0028, 0x0010, b"US", b"\1\0"))
    return path


@pytest.mark.parametrize("explicit", [True, False])
def test_every_series_of_a_folder_is_a_slide(tmp_path: Path, explicit: bool) -> None:
    """Two slides in one folder are two cases, by a folder or by a manifest, and the files of each have its hash."""
    for name, series in {"p0": "1.2.1", "p1": "1.2.1", "q0": "1.2.2", "q1": "1.2.2"}.items():
        dicom_file(tmp_path / "d" / f"{name}.dcm", series, explicit=explicit)
    dicom_file(tmp_path / "d/ann.dcm", "1.2.3", explicit=explicit, sop_class="1.2.840.10008.5.1.4.1.1.91.1")
    found = find_dataset(FolderSlides(kind="folder", folder=tmp_path, limit=None))
    assert [(case.slide_id, case.path.name) for case in found.cases] == [("p0", "p0.dcm"), ("q0", "q0.dcm")]
    assert found.skipped == ("d/ann.dcm: DICOM of another class than images of slides",)
    listed = read_manifest(manifest(tmp_path, "path\nd/p1.dcm\nd/q0.dcm\n"))
    assert [case.slide_id for case in listed] == ["p0", "q0"]
    before = [content.sha256(case.path) for case in listed]
    assert before == [content.sha256(case.path) for case in found.cases]
    assert before[0] != before[1]
    dicom_file(tmp_path / "d/r.dcm", "1.2.4", explicit=explicit)
    (tmp_path / "d/s.dcm").write_bytes(b"no DICOM")
    assert [content.sha256(case.path) for case in listed] == before
    dicom_file(tmp_path / "d/q2.dcm", "1.2.2", explicit=explicit)
    assert [a == content.sha256(case.path) for a, case in zip(before, listed, strict=True)] == [True, False]
    with pytest.raises(InputError, match=r"line 3: p1\.dcm is the same file as in line 2"):
        read_manifest(manifest(tmp_path, "path,label\nd/p0.dcm,1\nd/p1.dcm,1\n"))


def test_a_series_alone_in_its_folder_is_named_after_it(tmp_path: Path) -> None:
    """As before there was more than one; what is not an image of a slide does not count."""
    for name in ("p0", "p1"):
        dicom_file(tmp_path / "case" / f"{name}.dcm", "1.2.1")
    dicom_file(tmp_path / "case/ann.dcm", "1.2.3", sop_class="1.2.840.10008.5.1.4.1.1.91.1")
    assert [case.slide_id for case in read_folder(tmp_path)] == ["case"]


def test_a_damaged_dicom_file_is_no_reason_to_fail(tmp_path: Path) -> None:
    """Whatever the header holds, the file is a slide that fails when it is opened."""
    whole = dicom_file(tmp_path / "a.dcm", "1.2.1").read_bytes()
    for length in range(128, len(whole), 3):
        (tmp_path / "a.dcm").write_bytes(whole[:length] + b"\xff" * 3)
        assert [case.slide_id for case in read_folder(tmp_path)] == ["a"]


def test_a_folder_without_slides_is_refused(tmp_path: Path) -> None:
    """An empty folder and a missing one have different messages."""
    with pytest.raises(InputError, match="contains no slide"):
        read_folder(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        read_folder(tmp_path / "none")


def test_the_real_folder_is_read(shared_data: Path) -> None:
    """Six good slides and two bad ones are listed; the bad ones fail when they are opened."""
    names = {case.slide_id for case in read_folder(shared_data / "wsi")}
    assert len(names) == 8
    assert {"boxes_dicom", "multi_frame_jpeg2000_camelyon_challenge_image", "broken"} <= names


def test_a_single_slide_is_a_data_set(slides: Path) -> None:
    """It is named as in a folder and has its annotation; a missing file only fails on opening."""
    assert read_single(slides / "a.tif") == (Case("a", slides / "a.tif", annotation_path=slides / "a.xml"),)
    assert read_single(slides / "dicom" / "2.dcm")[0].slide_id == "dicom"
    assert read_single(slides / "gone.svs")[0].path == slides / "gone.svs"


FORM: TypeAdapter[SyntheticSlides | GivenSlides] = TypeAdapter(DatasetParams)


@pytest.mark.parametrize(("limit", "count"), [("", 5), (None, 5), (2, 2), (9, 5)])
def test_a_data_set_is_loaded_up_to_a_limit(slides: Path, limit: object, count: int) -> None:
    """The first slides are used; without a limit all are."""
    params = FolderSlides.model_validate({"kind": "folder", "folder": slides, "limit": limit})
    assert len(load_dataset(params)) == count


def test_each_kind_reads_its_own_setting(slides: Path) -> None:
    """Each kind reads a manifest, a folder or a slide."""
    listed = slides / "manifest.csv"
    listed.write_text("path\nb.SVS\n")
    given = [
        ManifestSlides(kind="manifest", manifest=listed, limit=None),
        FolderSlides(kind="folder", folder=slides / "lone", limit=None),
        SingleSlide(kind="single", path=slides / "a.tif", limit=None),
    ]
    assert [[case.slide_id for case in load_dataset(params)] for params in given] == [["b"], ["x"], ["a"]]
    assert [source_of(params) for params in given] == [listed, slides / "lone", slides / "a.tif"]


SETTING = {"manifest": "manifest", "folder": "folder", "single": "path", "synthetic": "folder"}


@pytest.mark.parametrize("kind", SETTING)
def test_what_earlier_versions_wrote_of_other_kinds_is_passed_over(kind: str) -> None:
    """Every setting was there, whatever the kind: as YAML had it, and as JSON of finished runs has it."""
    own = {"kind": kind, SETTING[kind]: "/slides"}
    flat = FORM.validate_python({**FLAT, **own})
    assert flat == FORM.validate_python({**FLAT, **dict.fromkeys(("manifest", "folder", "path", "data")), **own})
    assert source_of(flat) == Path("/slides")


def test_what_is_given_of_other_kinds_is_refused_but_for_runs_that_were() -> None:
    """It had no meaning, and their folders are still read."""
    given = {"kind": "manifest", "manifest": "/m.csv", "limit": None, "folder": "/slides", "size_px": 9000}
    with pytest.raises(ValidationError, match=r"dataset\.folder is given, but the slides are listed in a manifest"):
        FORM.validate_python(given)
    assert FORM.validate_python(given, context=RECORDED) == ManifestSlides.model_validate(
        {"kind": "manifest", "manifest": "/m.csv", "limit": None}
    )


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"kind": "cloud"}, "dataset.kind is cloud, it must be one of manifest, folder, single, synthetic"),
        ({"limit": 0}, "greater than or equal to 1"),
        ({"glob": "*"}, "Extra inputs"),
        ({"folder": ""}, "it is empty"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object], told: str) -> None:
    """Unknown kinds and keys, a limit of no slides, and slides that are nowhere, are refused at the start."""
    with pytest.raises(ValidationError, match=told):
        FORM.validate_python({"kind": "folder", "folder": "/slides", "limit": None, **wrong})
