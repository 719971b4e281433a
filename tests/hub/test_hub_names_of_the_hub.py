"""Names of the Hugging Face Hub: their forms, revisions with slashes, and which file of a repository is meant."""

from pathlib import Path

import pytest
from fake_hub import FakeHub, Reply

from forge import hub
from forge.errors import DownloadError, ModelNotFoundError
from forge.hub import names

REPO = "good/repo-GGUF"
FORMS = [
    "hf:good/repo-GGUF/sub/a b.gguf",
    "hf://good/repo-GGUF/sub/a b.gguf",
    "HF:good/repo-GGUF/sub/a b.gguf",
    "hf:good/repo-GGUF@main/sub/a b.gguf",
    "hf.co/good/repo-GGUF/sub/a b.gguf",
    "huggingface.co/good/repo-GGUF/blob/main/sub/a%20b.gguf",
    "https://huggingface.co/good/repo-GGUF/blob/main/sub/a%20b.gguf",
    "https://huggingface.co/good/repo-GGUF/resolve/main/sub/a%20b.gguf?download=true",
    "https://huggingface.co/good/repo-GGUF/raw/main/sub/a%20b.gguf#L1",
    "https://hf.co/good/repo-GGUF/resolve/main/sub/a b.gguf",
    "http://www.huggingface.co/good/repo-GGUF/tree/main/sub/a%20b.gguf",
    "HTTPS://HuggingFace.co/good/repo-GGUF/resolve/main/sub/a%20b.gguf",
    "https://huggingface.co/good/repo-GGUF?show_file_info=sub%2Fa+b.gguf",
    "https://huggingface.co/good/repo-GGUF/tree/main?show_file_info=sub%2Fa+b.gguf&library=x",
    "ENDPOINT/good/repo-GGUF/resolve/main/sub/a%20b.gguf",
]


@pytest.mark.parametrize("text", FORMS)
def test_every_form_of_a_hub_name_is_parsed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9/mirror/")
    name = names.parse(text.replace("ENDPOINT", "http://127.0.0.1:9/mirror"))
    assert names.is_hub_name(text) or text.startswith("ENDPOINT")
    assert name.repo == REPO
    assert [(revision or "main", file) for revision, file in name.places] == [("main", "sub/a b.gguf")]


def test_resolve_fetches_the_named_file(the_hub: FakeHub) -> None:
    the_hub.add(REPO, "sub/a b.gguf", "other.gguf")
    for text in (FORMS[0], f"{the_hub.url}/good/repo-GGUF/resolve/main/sub/a%20b.gguf"):
        assert hub.resolve(text).read_bytes() == b"GGUF of sub/a b.gguf"
    assert the_hub.asked("GET") == [f"/{REPO}/resolve/main/sub/a%20b.gguf"]


@pytest.mark.parametrize(
    ("text", "revision", "file"),
    [
        ("hf:good/repo@refs/pr/3/m.gguf", "refs/pr/3", "m.gguf"),
        ("hf:good/repo@refs/pr/3/d/m.gguf", "refs/pr/3", "d/m.gguf"),
        ("hf:good/repo@feat/x/m.gguf", "feat/x", "m.gguf"),
        ("hf:good/repo@feat%2Fx/m.gguf", "feat/x", "m.gguf"),
        ("hf:good/repo@feat/x/d/m.gguf", "feat/x", "d/m.gguf"),
        ("hf:good/repo@feat%2Fx/d/m.gguf", "feat/x", "d/m.gguf"),
        ("hf:good/repo@v1/d/m.gguf", "v1", "d/m.gguf"),
        ("https://huggingface.co/good/repo/blob/refs%2Fpr%2F3/m.gguf", "refs/pr/3", "m.gguf"),
        ("https://huggingface.co/good/repo/resolve/feat/x/d/m.gguf", "feat/x", "d/m.gguf"),
        ("hf:good/repo@refs/pr/3", "refs/pr/3", "only.gguf"),
        ("hf:good/repo@feat/x:q8_0", "feat/x", "a-Q8_0.gguf"),
        ("hf:good/repo@feat%2Fx:q8_0", "feat/x", "a-Q8_0.gguf"),
        ("https://huggingface.co/good/repo/tree/refs%2Fpr%2F3", "refs/pr/3", "only.gguf"),
        ("https://huggingface.co/good/repo/tree/refs/pr/3", "refs/pr/3", "only.gguf"),
    ],
)
def test_a_revision_may_hold_slashes(the_hub: FakeHub, text: str, revision: str, file: str) -> None:
    body = f"GGUF {revision} {file}".encode()
    the_hub.add("good/repo", "main.gguf")
    the_hub.add("good/repo", file, revision=revision, body=body)
    path = hub.resolve(text)
    assert path.read_bytes() == body
    assert hub.resolve(text, download=False) == path  # the revision is found again without the Hub


def test_the_shortest_revision_that_has_the_file_wins(the_hub: FakeHub) -> None:
    the_hub.add("good/repo", "x/m.gguf", revision="feat", body=b"GGUF short")  # as only a tag beside a branch can be
    the_hub.add("good/repo", "m.gguf", revision="feat/x", body=b"GGUF long")
    the_hub.commits["feat/x"] = "f" * 40
    assert hub.resolve("hf:good/repo@feat/x/m.gguf").read_bytes() == b"GGUF short"
    assert hub.resolve("hf:good/repo@feat%2Fx/m.gguf").read_bytes() == b"GGUF long"


@pytest.mark.parametrize("revision", ["main", "0123456789" * 4, "refs/pr/3", "feat%2Fx"])
def test_a_revision_that_ends_where_it_must_is_asked_once(revision: str) -> None:
    name = names.parse(f"hf:good/repo@{revision}/d/e/m.gguf")
    assert name.places == ((revision.replace("%2F", "/"), "d/e/m.gguf"),)
    assert len(names.parse("hf:good/repo@v1/d/e/m.gguf").places) == 3


def test_a_missing_repository_revision_or_file_is_told_apart(the_hub: FakeHub) -> None:
    the_hub.add("good/repo", "m.gguf", revision="feat/x")
    for name, reason in {
        "hf:good/repo@feat/y/m.gguf": "no such revision: check what follows the @",
        "hf:good/repo@feat/x/n.gguf": "no file 'n.gguf': check the name, folders included",
        "hf:good/repo@refs/pr/3/m.gguf": "no such revision",
        "hf:good/repo@feat%2Fy:Q8_0": "no such revision",
        "hf:bad/repo": "there is no such repository, or it is private",
    }.items():
        with pytest.raises(DownloadError, match=f"^{name}: .*{reason}"):
            hub.resolve(name)


@pytest.mark.parametrize(
    "name",
    [
        "hf:good/repo/a\nb.gguf",
        "hf:good/repo/\x1b[31mred.gguf",
        "hf:good/repo\x7f/x.gguf",
        "hf:good/repo/\u202egguf.exe.gguf",
        "hf:good/repo@re\tv/x.gguf",
        "hf:good/repo:Q4\r",
        "hf:good/repo/x\0.gguf",
        "hf:good/repo/\ud800.gguf",
        "https://huggingface.co/good/repo/blob/main/a\u0085b.gguf",
    ],
)
def test_control_characters_are_refused(name: str) -> None:
    for function in (hub.resolve, hub.pull):
        with pytest.raises(ModelNotFoundError, match=r"holds control characters") as caught:
            function(name)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "name",
    [
        *("hf:", "hf:owner", "hf:owner/", "hf:/repo", "hf:///", "hf:owner/repo@", "hf:owner/repo:", "hf:owner/repo@:"),
        *(
            "hf:owner/repo@rev:",
            "hf:owner/repo:a/b",
            "hf:owner/repo:Q4 K",
            "hf:owner/repo/notes.txt",
            "hf:owner/repo//",
        ),
        *("hf:owner/repo/../x.gguf", "hf:owner/repo/./x.gguf", "hf:owner/repo/a\\b.gguf", "hf:owner/repo@../x.gguf"),
        *(
            "hf:owner/repo@..%2F../x.gguf",
            "hf:owner/repo@a//x.gguf",
            "hf:owner/repo@x.gguf",
            "hf:own er/repo",
            "hf:owner/repo//",
        ),
        *(f"hf:owner/repo{more}" for more in ("?x=1", "#x", " x", "é", "-é/x.gguf", "%20x", "+x", "?x.gguf", "=")),
        *(
            "hf:owner/repo//",
            "https://huggingface.co/",
            "https://huggingface.co/owner",
            "https://huggingface.co/owner/repo/blob/main",
        ),
        *("https://huggingface.co/owner/repo/blob/x.gguf", "https://huggingface.co/owner/repo/blob/main/README.md"),
        *("https://huggingface.co/datasets/owner/repo", "https://huggingface.co/spaces/owner/repo"),
        *("https://huggingface.co/owner/repo/resolve/main/%2e%2e/x.gguf", "hf.co/owner/repo/discussions", "hf.co/"),
        *(
            "https://huggingface.co/owner/repo/resolve/main/a%0ab.gguf",
            "https://huggingface.co/owner/repo/blob/%00/x.gguf",
        ),
        *("https://[", "https://huggingface.co/owner/repo/resolve/%2e%2e%2fx/x.gguf"),
    ],
)
def test_what_is_no_name_of_the_hub(name: str) -> None:
    assert names.is_hub_name(name)
    with pytest.raises(ModelNotFoundError, match="is not of the form hf:owner/repo, ") as caught:
        names.parse(name)
    assert str(caught.value).isprintable()


def test_other_addresses_and_endless_names() -> None:
    for name in ("https://example.com/o/r/x.gguf", "https://huggingface.co.evil.com/o/r", "http://127.0.0.1:1/o/r"):
        with pytest.raises(ModelNotFoundError, match="is no address of the Hugging Face Hub: download the file"):
            hub.resolve(name)
    with pytest.raises(ModelNotFoundError, match="more than 1000 characters") as caught:
        hub.resolve(f"hf:good/repo/{'x' * 100_000}.gguf")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("owner/repo", "hf:owner/repo"),
        ("owner/repo:Q4_K_M", "hf:owner/repo:Q4_K_M"),
        ("owner/repo@v1", "hf:owner/repo@v1"),
        ("owner/repo/file.gguf", "hf:owner/repo/file.gguf"),
    ],
)
def test_a_repository_without_its_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, written: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for function in (hub.resolve, hub.pull):
        with pytest.raises(ModelNotFoundError, match=f"for a repository of the Hugging Face Hub write '{written}'"):
            function(name)
    Path("owner").mkdir()
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"GGUF")
    assert hub.resolve(name) == Path(name)  # a file wins


@pytest.mark.parametrize("name", ["/owner/repo", "./repo", "a/b/c/d", "~/x", "a/b/c.bin", "a//b"])
def test_other_paths_give_no_such_hint(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="no such file") as caught:
        hub.resolve(name)
    assert "hf:" not in str(caught.value)


LISTED = [
    *("README.md", "config.json", "imatrix-Q4_K_M.gguf", "mmproj-m-Q8_0.gguf", "mmproj-F16.gguf"),
    *("m-BF16.gguf", "m-F16.gguf", "m-IQ4_NL.gguf", "m-Q4_0.gguf", "m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m-Q8_0.gguf"),
    *("Q6_K/m-Q6_K-00001-of-00002.gguf", "Q6_K/m-Q6_K-00002-of-00002.gguf", "m-UD-Q2_K_XL.gguf", "m.q5_k_m.gguf"),
]


@pytest.mark.parametrize(
    ("files", "quant", "chosen"),
    [
        (LISTED, "", "m-Q4_K_M.gguf"),
        (LISTED, ":latest", "m-Q4_K_M.gguf"),
        (LISTED, ":q4_k_m", "m-Q4_K_M.gguf"),
        (LISTED, ":Q8_0", "m-Q8_0.gguf"),
        (LISTED, ":F16", "m-F16.gguf"),  # and not BF16, which llama.cpp finds first
        (LISTED, ":bf16", "m-BF16.gguf"),
        (LISTED, ":Q6_K", "Q6_K/m-Q6_K-00001-of-00002.gguf"),
        (LISTED, ":UD-Q2_K_XL", "m-UD-Q2_K_XL.gguf"),
        (LISTED, ":Q2_K_XL", "m-UD-Q2_K_XL.gguf"),
        (LISTED, ":Q5_K_M", "m.q5_k_m.gguf"),
        (LISTED, ":m-Q4_0.gguf", "m-Q4_0.gguf"),
        (["m-Q8_0.gguf", "m-Q5_K_M.gguf"], "", "m-Q8_0.gguf"),
        (["m-F16.gguf", "mmproj-F16.gguf"], "", "m-F16.gguf"),
        (["only.gguf"], "", "only.gguf"),
        (["x-Q4_K_M-v2.gguf"], ":Q4_K_M", "x-Q4_K_M-v2.gguf"),
        (["m-Q4_K_M-00001-of-00002.gguf", "m-Q4_K_M-00002-of-00002.gguf"], "", "m-Q4_K_M-00001-of-00002.gguf"),
    ],
)
def test_a_quantization_chooses_the_file_as_in_llama_cpp(files: list[str], quant: str, chosen: str) -> None:
    name = names.parse(f"hf:{REPO}{quant}")
    assert name.places[0][1] or names.choose(name, sorted(files)) == chosen
    assert names.parse(f"hf.co/{REPO}{quant}").places == name.places


@pytest.mark.parametrize("listings", [("revision",), ("tree",)], ids=lambda kinds: kinds[0])
def test_a_chosen_file_is_fetched_and_found_again(the_hub: FakeHub, listings: tuple[str]) -> None:
    the_hub.listings = listings
    the_hub.add(REPO, *LISTED)
    for quant, chosen in (
        (":q8_0", "m-Q8_0.gguf"),
        (":Q6_K", "Q6_K/m-Q6_K-00001-of-00002.gguf"),
        ("", "m-Q4_K_M.gguf"),
    ):
        path = hub.resolve(f"hf:{REPO}{quant}")
        assert path.read_bytes() == f"GGUF of {chosen}".encode()
        assert hub.resolve(f"hf.co/{REPO}{quant}", download=False) == path
    the_hub.spoil = lambda method, path, reply: setattr(reply, "status", 503)
    assert hub.resolve(f"hf:{REPO}") == path  # the Hub is down
    with pytest.raises(DownloadError, match=r"cannot get it from .* \(503 Service Unavailable\): check the network"):
        hub.resolve(f"hf:{REPO}:BF16")


@pytest.mark.parametrize(
    ("files", "quant", "message"),
    [
        (LISTED, ":Q3_K", "has no such file: it has Q6_K/m-Q6_K-00001-of-00002.gguf, m-BF16.gguf, .*, m.q5_k_m.gguf$"),
        (
            ["m-F16.gguf", "m-BF16.gguf"],
            "",
            "several files may be meant: m-BF16.gguf, m-F16.gguf: name one, as hf:",
        ),
        (["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"], "", "several files may be meant: a-Q4_K_M.gguf, b-Q4_K_M.gguf: name one"),
        (["a-Q8_0.gguf", "b/a-Q8_0.gguf"], ":q8_0", "several files may be meant: a-Q8_0.gguf, b/a-Q8_0.gguf: name one"),
        (["README.md", "mmproj-F16.gguf"], "", "the repository has no GGUF file"),
        (["README.md"], ":Q8_0", "the repository has no GGUF file"),
        ([f"m{i:03}.gguf" for i in range(500)], "", r"m000.gguf, .*, m011.gguf and 488 more: name one"),
    ],
)
def test_a_name_without_a_file_lists_the_choices(files: list[str], quant: str, message: str) -> None:
    with pytest.raises(ModelNotFoundError, match=f"^hf:{REPO}{quant}: .*{message}") as caught:
        names.choose(names.parse(f"hf:{REPO}{quant}"), sorted(files))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"[" * 100_000, b"{}", b"null", b'{"siblings": 5}', b"\xff", b'"x"'],
    ids=["empty", "html", "deep", "object", "null", "number", "bytes", "text"],
)
def test_a_malformed_listing_is_refused(the_hub: FakeHub, body: bytes) -> None:
    the_hub.add(REPO, "m-Q4_K_M.gguf")
    the_hub.spoil = lambda method, path, reply: setattr(reply, "body", body)
    with pytest.raises(DownloadError, match=f"^hf:{REPO}: cannot get it from {the_hub.url} .it sent no list of "):
        hub.resolve(f"hf:{REPO}")


@pytest.mark.parametrize("code", ["EntryNotFound", "RevisionNotFound", "RepoNotFound", "GatedRepo", "", "x"])
def test_a_listing_that_is_refused(the_hub: FakeHub, code: str) -> None:
    def refuse(method: str, path: str, reply: Reply) -> None:
        reply.status, reply.headers = 404, {"X-Error-Code": code}

    the_hub.add(REPO, "m-Q4_K_M.gguf")
    the_hub.spoil = refuse
    with pytest.raises(DownloadError, match=f"^hf:{REPO}: .*(the|such) repository"):
        hub.resolve(f"hf:{REPO}")


def test_hostile_entries_of_a_listing_are_left_out(the_hub: FakeHub) -> None:
    the_hub.add(
        REPO, "m-Q4_K_M.gguf", "../m-Q4_K_M.gguf", "a\nb-Q4_K_M.gguf", "/etc/x-Q4_K_M.gguf", "a\\..\\Q4_K_M.gguf"
    )
    assert hub.resolve(f"hf:{REPO}").read_bytes() == b"GGUF of m-Q4_K_M.gguf"
    body = b'[5, null, [], {"path": 7}, {"path": {}}, {"rfilename": null}, {"path": "m-Q4_K_M.gguf"}]'
    the_hub.spoil = lambda method, path, reply: setattr(reply, "body", body) if "/api/" in path else None
    assert hub.resolve(f"hf:{REPO}").read_bytes() == b"GGUF of m-Q4_K_M.gguf"


def test_a_file_that_is_listed_twice_is_one(the_hub: FakeHub) -> None:
    the_hub.add(REPO, "m.gguf")
    body = b'{"siblings": [{"rfilename": "m.gguf"}, {"rfilename": "m.gguf"}]}'
    the_hub.spoil = lambda method, path, reply: setattr(reply, "body", body) if "/api/" in path else None
    assert hub.resolve(f"hf:{REPO}").read_bytes() == b"GGUF of m.gguf"


# ---- shards


def test_a_count_of_shards_that_is_not_there_is_one_request(the_hub: FakeHub) -> None:
    the_hub.add("good/repo", "x-00001-of-99999.gguf")
    with pytest.raises(DownloadError, match=r"has no file 'x-99999-of-99999\.gguf'"):
        hub.resolve("hf:good/repo/x-00001-of-99999.gguf")
    assert len(the_hub.log) == 1


def test_a_count_of_shards_that_cannot_be_is_one_request(the_hub: FakeHub) -> None:
    the_hub.add("good/repo", *(f"x-{n:05}-of-99999.gguf" for n in (1, 2, 99999)))
    with pytest.raises(DownloadError, match="no model has 99999 shards, at most 1000: check the name"):
        hub.resolve("hf:good/repo/x-00001-of-99999.gguf")
    assert len(the_hub.log) == 1


def test_the_first_shard_tells_how_many_there_are(the_hub: FakeHub, tmp_path: Path) -> None:
    key = b"GGUF" + b"\x0b\0\0\0\0\0\0\0split.count\2\0\0\0\3\0"  # a key of GGUF: length, name, type uint16, value
    parts = [f"x-{n:05}-of-00900.gguf" for n in range(1, 901)]
    the_hub.add("good/repo", *parts, body=key)
    with pytest.raises(DownloadError, match="says that there are 3 shards, its name 900: check the name"):
        hub.resolve("hf:good/repo/x-00001-of-00900.gguf")
    assert len(the_hub.log) == 3
    the_hub.add("good/repo", *(f"y-{n:05}-of-00003.gguf" for n in (1, 2, 3)), body=key)
    path = hub.resolve("hf:good/repo/y-00002-of-00003.gguf")
    assert sorted(file.name for file in path.parent.glob("y-*")) == [f"y-{n:05}-of-00003.gguf" for n in (1, 2, 3)]
    assert path.name == "y-00001-of-00003.gguf"


def test_names_shards_of_a_plain_file() -> None:
    assert names.shards("x.gguf") == ["x.gguf"]
    assert names.shards("x-٠٠٠٠١-of-٠٠٠٠٢.gguf") == ["x-٠٠٠٠١-of-٠٠٠٠٢.gguf"]  # digits, but nobody's shards
    assert names.shards("a/X-00002-of-00002.GGUF") == ["a/X-00001-of-00002.GGUF", "a/X-00002-of-00002.GGUF"]
