"""Whether a run may go on from a state that another method, or other settings, have left."""

from __future__ import annotations

from typing import Any

from heatopt.local._settings import LocalSettings
from heatopt.sync import NO_WEIGHT

__all__ = ["check_state"]


def check_state(state: dict[str, Any] | None, settings: LocalSettings, needs_anchor: bool) -> None:
    """Raise ValueError if a run with ``settings`` cannot end what was under way.

    Args:
        state: of an engine; None, or one of a single process, has nothing under way.
        settings: of the engine that is to go on.
        needs_anchor: whether that one has an anchor.
    """
    if state is None or state["ranks"] < 2:
        return
    has_anchor = state["anchors"] is not None
    what = ""
    if needs_anchor and not has_anchor and (state["flight"] or (state["samples"] != NO_WEIGHT).any()):
        what = "it has no anchor, the parameters that ranks had in common before they trained apart"
    elif state["flight"]:
        saved = {"merge": state["merge"], "fragments": len(state["fragments"]), "anchor": has_anchor}
        own = {"merge": settings.merge, "fragments": settings.fragments, "anchor": needs_anchor}
        differs = [f"{name} {saved[name]!r}, here {own[name]!r}" for name in own if saved[name] != own[name]]
        what = f"averages were on their way, with {' and '.join(differs)}" if differs else ""
    if what:
        raise ValueError(
            f"{settings.method} cannot go on from this state: {what}; "
            "load it with the method and the settings that saved it, or call synchronize() before state_dict()"
        )
