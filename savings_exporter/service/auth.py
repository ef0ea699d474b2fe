"""Who may use the service: bearer tokens (RFC 6750), and passwords (RFC 7617) that are kept as bcrypt hashes."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import NamedTuple

import bcrypt

from savings_exporter.service.problems import RefusedError

_MOST_CHECKS = 16
# What bcrypt makes a hash of. Tools that make hashes cut longer passwords, or refuse them.
_MOST_PASSWORD_BYTES = 72

# One thread for all: guesses take the time of one processor at most. Its work is done without Python's global lock.
_checking_passwords = ThreadPoolExecutor(1, "passwords")


class Token(NamedTuple):
    """A bearer token, and what it permits."""

    text: bytes
    reads: bool
    writes: bool


class Credentials:
    """The tokens and the users that are known, and which passwords were right.

    Args:
        users: the names of users and the bcrypt hashes of their passwords. A user may read and write.
    """

    def __init__(self, tokens: Sequence[Token], users: Mapping[str, str]) -> None:
        self._tokens = tuple(tokens)
        self._users = {name.encode(): found.encode() for name, found in users.items()}
        self._hashes = tuple(self._users.values())
        scheme = 'Basic realm="savings-exporter", charset="UTF-8"' if users else "Bearer"
        self._challenge = {"WWW-Authenticate": scheme}
        # Digests of the passwords that were right, with a key that is known to this process only.
        self._key = os.urandom(32)
        self._right: dict[bytes, bytes] = {}
        self._running: dict[bytes, asyncio.Future[bool]] = {}

    def refusal(self, shown: bytes | None, *, writes: bool) -> RefusedError | None:
        """Why a request with this ``Authorization`` is refused; None if it is not.

        The answer can be an ``UncheckedPasswordError``, because it takes long to check a password.
        """
        scheme, _, rest = (shown or b"").partition(b" ")
        scheme, rest = scheme.lower(), rest.strip()
        if scheme == b"bearer":
            return self._token_refusal(rest, writes=writes)
        if scheme == b"basic" and self._users:
            return self._password_refusal(rest)
        return self.wrong(shown is not None)

    def wrong(self, is_given: bool = True) -> RefusedError:
        """The refusal of wrong credentials, or of a request without any."""
        if self._users:
            detail = (
                "the user or the password is wrong" if is_given else "a user and a password, or a token, is missing"
            )
        else:
            detail = "bearer token missing or wrong"
        return RefusedError(HTTPStatus.UNAUTHORIZED, detail, headers=self._challenge)

    async def check(self, shown: UncheckedPasswordError) -> RefusedError | None:
        """Why a request with this password is refused; None if the password is right."""
        running = self._running.get(shown.digest)
        if running is None:
            if len(self._running) >= _MOST_CHECKS:
                detail = "too many passwords are being checked"
                return RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, detail, retry=True)
            loop = asyncio.get_running_loop()
            running = loop.run_in_executor(_checking_passwords, self._is_right, shown.user, shown.password)
            # Requests that come with the same password meanwhile wait for the same check.
            self._running[shown.digest] = running
            running.add_done_callback(lambda _: self._running.pop(shown.digest))
        if not await asyncio.shield(running):
            return self.wrong()
        self._right[shown.user] = shown.digest
        return None

    def _token_refusal(self, shown: bytes, *, writes: bool) -> RefusedError | None:
        is_known = is_permitted = False
        for token in self._tokens:
            if hmac.compare_digest(shown, token.text):
                is_known = True
                is_permitted |= token.writes if writes else token.reads
        if not is_known:
            return RefusedError(HTTPStatus.UNAUTHORIZED, "the token is wrong", headers=self._challenge)
        if not is_permitted:
            detail = f"this token does not permit {'writing' if writes else 'reading'}"
            return RefusedError(HTTPStatus.FORBIDDEN, detail)
        return None

    def _password_refusal(self, shown: bytes) -> RefusedError | None:
        try:
            user, colon, password = base64.b64decode(shown, validate=True).partition(b":")
        except binascii.Error:
            return self.wrong()
        if not colon:
            return self.wrong()
        digest = hashlib.blake2b(b"%d:%b%b" % (len(user), user, password), key=self._key).digest()
        if hmac.compare_digest(self._right.get(user, b""), digest):
            return None
        return UncheckedPasswordError(self.wrong(), self, user, password, digest)

    def _is_right(self, user: bytes, password: bytes) -> bool:
        """Check a password. An unknown user takes as long as a known one."""
        found = self._users.get(user)
        any_hash = self._hashes[hmac.digest(self._key, user, "sha256")[0] % len(self._hashes)]
        try:
            return bcrypt.checkpw(password[:_MOST_PASSWORD_BYTES], found or any_hash) and found is not None
        except ValueError:  # a password with a zero byte, in some versions
            return False


class UncheckedPasswordError(RefusedError):
    """The refusal of a request until its password is checked."""

    def __init__(
        self, refusal: RefusedError, credentials: Credentials, user: bytes, password: bytes, digest: bytes
    ) -> None:
        super().__init__(refusal.status, refusal.detail, headers=refusal.headers)
        self.credentials = credentials
        self.user = user
        self.password = password
        self.digest = digest
