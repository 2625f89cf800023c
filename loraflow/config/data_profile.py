"""The checks of `data.profile`: what is looked for in the rows, and what is done with what is found."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from loraflow.frozen import FrozenModel

ProfileCheckName = Literal["refusals", "openings", "disputed", "scripts", "broken_text", "control_tokens", "personal"]
# Share of the rows from which a check acts. Some refusals and languages are often intended; damaged text never is.
_SHARES: dict[ProfileCheckName, float] = {
    "refusals": 0.05,
    "openings": 0.2,
    "disputed": 0.01,
    "scripts": 0.05,
    "broken_text": 0.0,
    "control_tokens": 0.0,
    "personal": 0.0,
}


class ProfileRule(FrozenModel):
    """What one check does."""

    action: Literal["warn", "quarantine", "fail"] = Field(
        "warn", description="warn: report it. quarantine: leave these rows out, and count them. fail: stop the run."
    )
    share: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None,
        description="Act only if more than this share of the rows is concerned. With quarantine, the default is 0.",
    )

    def limit(self, check: ProfileCheckName) -> float:
        """Return the share of rows above which a check acts."""
        if self.share is not None:
            return self.share
        return 0.0 if self.action == "quarantine" and check != "openings" else _SHARES[check]


def default_rules(*, personal: bool) -> dict[ProfileCheckName, ProfileRule]:
    """Return the rules of `loraflow data check`: every check warns. Personal data is looked for only if asked for."""
    return {name: ProfileRule() for name in _SHARES if personal or name != "personal"}
