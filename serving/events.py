"""Events from predicted segments, see `cmran.evaluation.events`."""

from cmran.evaluation.events import Event, events_of

__all__ = ["Event", "events_of"]
