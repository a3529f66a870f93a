"""What the commands write: in any encoding, and without what other libraries say that means nothing to a user."""

from __future__ import annotations

import codecs
import io
import os
import sys
import warnings

LOOKALIKES = str.maketrans(
    {"█": "#", "━": "-", "╸": "-", "╺": "-", "•": "*", "…": "...", "×": "x", "–": "-", "—": "-", "→": "->"}
    | dict.fromkeys("‘’", "'")
    | dict.fromkeys("“”", '"')
)
MEANINGLESS: list[tuple[type[Warning], str, str]] = [
    # Lightning asks for a class of torch by its old name, each time that it combines data loaders.
    (FutureWarning, r"lightning\.pytorch\.utilities\._pytree", r"`isinstance\(treespec, LeafSpec\)` is deprecated"),
    # What is frozen rests on purpose: the start-up table says what trains.
    (UserWarning, r"lightning\.pytorch\.loops\.fit_loop", r"Found \d+ module\(s\) in eval mode at the start of train"),
    # Answers are counted over all ranks before the share of right ones is logged.
    (
        UserWarning,
        r"lightning\.pytorch\.trainer\.connectors\.logger_connector\.result",
        r"It is recommended to use `self\.log\('val/(accuracy|family/|level/).*sync_dist=True",
    ),
]
"""Warnings that say nothing to a user: category, the module that is warned, how the message begins."""
BAR_DELAY = "3"
"""Seconds that a bar of another library ("Loading weights") must last before it is shown."""


def prepare_output() -> None:
    """Let this process write any text wherever its output goes, and keep meaningless lines of other libraries out."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="lavi.lookalike")
    for category, module, message in MEANINGLESS:
        warnings.filterwarnings("ignore", category=category, module=module, message=message)
    os.environ.setdefault("TQDM_DELAY", BAR_DELAY)  # read when tqdm is imported


def lookalike(error: UnicodeError) -> tuple[str, int]:
    """For characters that an encoding does not have: ASCII that looks like them, or else their escape sequence."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(LOOKALIKES)
    return text.encode("ascii", "backslashreplace").decode(), error.end


codecs.register_error("lavi.lookalike", lookalike)
