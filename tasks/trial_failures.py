"""The failures that a trial of a sweep may have by itself: the sweep continues with the other trials."""

from __future__ import annotations

from loraflow.failures import (
    BadConfig,
    BadModel,
    CannotGroup,
    Crashed,
    DeadlineExceeded,
    Killed,
    MissingExtra,
    NonFiniteLoss,
    OutOfMemory,
    Stalled,
)

# Failures that a trial's settings may have caused. Any other, such as a full disk, would end the next trial too.
OF_THE_TRIAL = (
    NonFiniteLoss,
    OutOfMemory,
    Killed,
    Crashed,
    Stalled,
    DeadlineExceeded,
    BadConfig,
    BadModel,
    MissingExtra,
)
# A group has those of its trials too: trained by themselves, only the trial that caused one fails.
OF_THE_GROUP = (CannotGroup, *OF_THE_TRIAL)
