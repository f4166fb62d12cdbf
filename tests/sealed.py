"""Files with a digest, as an attacker writes them, and how they are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.errors import UserError
from engine.files import sha256_json

Content = dict[str, Any]


def refused_by(load: Callable[[Path], object], path: Path, content: str | bytes) -> str:
    """Write a file and return the one line with which it is refused."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as error:
        load(path)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    assert str(path) in message
    return message


def resealed(content: Content) -> str:
    """The file an attacker writes, who knows how the digest is made."""
    content.pop("digest", None)
    return json.dumps({**content, "digest": sha256_json(content)})
