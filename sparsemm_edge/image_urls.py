"""Images that are given as addresses: data: always, http(s): because a user wrote one."""

import http.client
import urllib.error
import urllib.request
from pathlib import Path

from PIL import Image

from sparsemm_edge import __version__
from sparsemm_edge.errors import SparseMMError, one_line
from sparsemm_edge.pictures import open_picture

_MAX_BYTES = 2**26
_SECONDS = 30


def is_url(given: str) -> bool:
    return given.lower().startswith(("data:", "http://", "https://"))


def open_image(given: str | Path) -> Image.Image:
    """The picture that a user names: a file, or an address that is_url knows.

    Raises:
        SparseMMError: no such file, nothing there, or not a picture.
    """
    if isinstance(given, Path) or not is_url(given):
        return open_picture(Path(given))
    where = "the data URL" if given[:5].lower() == "data:" else given
    return open_picture(_read(given, where), where)


def image_file(given: str, folder: Path) -> Path:
    """The file that a user names, or one in `folder` that holds the picture of an address."""
    if not is_url(given):
        return Path(given)
    path = folder / f"{len(list(folder.iterdir()))}.png"
    open_image(given).save(path)
    return path


def _read(url: str, where: str) -> bytes:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": f"sparsemm-edge/{__version__}"})
        with urllib.request.urlopen(request, timeout=_SECONDS) as response:
            data = bytes(response.read(_MAX_BYTES + 1))
    except urllib.error.HTTPError as error:
        raise SparseMMError(f"{where}: the server says {error.code} {error.reason}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise SparseMMError(f"{where}: cannot be read ({one_line(reason)})") from error
    if len(data) > _MAX_BYTES:
        raise SparseMMError(f"{where}: more than {_MAX_BYTES >> 20} MiB, too large for an image")
    return data
