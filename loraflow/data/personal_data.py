"""Find personal data in a text by its form: email addresses, phone numbers, IBANs, card numbers, public IP addresses.

IBANs and card numbers count only with their check digits, IP addresses only if they are public ones.
"""

from __future__ import annotations

import ipaddress
import re

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.)+[A-Za-z]{2,24}(?![\w-])")
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)")
_CARD = re.compile(r"(?<![\w.+-])[2-6]\d{3}(?:[ -]?\d){9,15}(?![\w-])")
_PHONE = re.compile(
    r"(?<![\w.+])(?:(?:\+|00)[1-9]\d{0,2}[ ./-]?(?:\(0?\d{0,4}\))?(?:[ ./-]?\d){6,12}"  # international
    r"|\(?[2-9]\d{2}\)?[ .-]\d{3}[.-]\d{4}"  # North America
    r"|0\d{2,4}[ /-]\d{3,}(?:[ -]?\d){1,6})(?![\w.]?\d)"  # with a prefix, as in much of Europe
)
_ADDRESS = re.compile(
    r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7})(?![\w:]|\.\d)"
)


def personal_data(text: str) -> str | None:
    """Return what personal data a text has, without the data; None if none is found."""
    if _EMAIL.search(text):
        return "an email address"
    if not any(character.isdigit() for character in text):
        return None
    if any(_is_iban(found[0]) for found in _IBAN.finditer(text)):
        return "an IBAN"
    if any(_is_card(found[0]) for found in _CARD.finditer(text)):
        return "a card number"
    if any(_is_public(found[0]) for found in _ADDRESS.finditer(text)):
        return "an IP address"
    return "a phone number" if _PHONE.search(text) else None


def _is_iban(text: str) -> bool:
    """Tell whether the check digits are right (ISO 7064, mod 97)."""
    plain = text.replace(" ", "")
    digits = "".join(str(int(character, 36)) for character in plain[4:] + plain[:4])
    return 15 <= len(plain) <= 34 and int(digits) % 97 == 1


def _is_card(text: str) -> bool:
    """Tell whether the check digit is right (Luhn's algorithm)."""
    digits = [int(character) for character in reversed(text) if character.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]
    return len(set(digits)) > 1 and (sum(digits[::2]) + sum(doubled)) % 10 == 0


def _is_public(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False
