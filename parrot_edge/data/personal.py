"""Personal data and secrets in a text, by pattern and, where a number carries one, by checksum.

It errs towards finding: a number that looks like a telephone's is taken for one. Names and postal
addresses are not found.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re

_EMAIL = re.compile(r"\b[\w.+-]{1,64}@([\w-]{1,63}(?:\.[\w-]{2,63})+)\b")
_EXAMPLES = re.compile(
    r"(?:.*\.)?(?:example\.(?:com|org|net|edu)|test|invalid|localhost)$", re.IGNORECASE
)  # RFC 2606
_DIGITS = re.compile(r"\d{3}")
_PHONE = re.compile(
    r"(?<![\w.+/-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}"  # +44 20 7946 0958
    r"|\(\d{3}\)[ .-]?\d{3}[ .-]\d{4}|\d{3}[.-]\d{3}[.-]\d{4})(?![\w-]|\.\d)"  # (212) 555-0123
)
_CARD = re.compile(
    r"(?<![\d.-])[2-6]\d{3}(?:[ -]?\d{4}){2}[ -]?\d{1,7}(?![\d-]|\.\d)"
    r"|(?<!\d)3[47]\d{2}[ -]?\d{6}[ -]?\d{5}(?!\d)"
)
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b")
_IPV4 = re.compile(r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?![\d.]*\d)")
_IPV6 = re.compile(r"(?<![\w:])(?:[0-9a-fA-F]{1,4}:){2,7}(?::?[0-9a-fA-F]{1,4}){1,6}(?![\w:])")
_SOCIAL_SECURITY = re.compile(r"(?<![\d-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])")
_KEY = re.compile(
    r"\b(?:sk-(?:proj-|ant-)?[A-Za-z0-9_-]{20,}|(?:AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36,}"
    r"|github_pat_\w{30,}|glpat-[\w-]{20,}|xox[abprs]-[A-Za-z0-9-]{10,}|AIza[0-9A-Za-z_-]{35}|hf_[A-Za-z]{30,}"
    r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_KEY_MARKS = ("sk-", "AKIA", "ASIA", "gh", "glpat-", "xox", "AIza", "hf_", "eyJ", "PRIVATE KEY-----")


def find_personal(text: str) -> str | None:
    """What kind of personal data is in a text, or None: "e-mail address", "key", "IBAN", "card number",
    "IP address", "social security number" or "telephone number".

    >>> find_personal("write to anna@firm.co please"), find_personal("anna@example.com")
    ('e-mail address', None)
    >>> find_personal("4111 1111 1111 1111"), find_personal("4111 1111 1111 1112")
    ('card number', None)
    """
    if "@" in text and any(not _EXAMPLES.match(match[1]) for match in _EMAIL.finditer(text)):
        return "e-mail address"
    if any(mark in text for mark in _KEY_MARKS) and _KEY.search(text):
        return "key"
    if ":" in text and any(_is_public(match[0]) for match in _IPV6.finditer(text)):
        return "IP address"
    if not _DIGITS.search(text) and "." not in text:
        return None
    if any(_is_public(match[0]) for match in _IPV4.finditer(text)):
        return "IP address"
    if any(_is_iban(match[0]) for match in _IBAN.finditer(text)):
        return "IBAN"
    if any(_is_card(match[0]) for match in _CARD.finditer(text)):
        return "card number"
    if _SOCIAL_SECURITY.search(text):
        return "social security number"
    return "telephone number" if _PHONE.search(text) else None


def _is_public(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(text).is_global
    return False


def _is_card(text: str) -> bool:
    """Luhn's checksum (ISO/IEC 7812-1)."""
    digits = [int(letter) for letter in text if letter.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return 13 <= len(digits) <= 19 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _is_iban(text: str) -> bool:
    """The checksum of ISO 13616 (modulo 97)."""
    letters = text.replace(" ", "")
    moved = letters[4:] + letters[:4]
    return 15 <= len(letters) <= 34 and int("".join(str(int(letter, 36)) for letter in moved)) % 97 == 1
