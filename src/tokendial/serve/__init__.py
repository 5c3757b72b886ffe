"""Serving: an engine that keeps deadlines by turning the dial, and HTTP around it."""

from tokendial.serve.controller import Dial, Observed, Rules, planned, pressure, turned
from tokendial.serve.costs import Costs, measured_costs
from tokendial.serve.engine import Answer, BatchDone, Engine, Status
from tokendial.serve.scheduler import Batch, Refused, Scheduler, Ticket

__all__ = [
    "Answer",
    "Batch",
    "BatchDone",
    "Costs",
    "Dial",
    "Engine",
    "Observed",
    "Refused",
    "Rules",
    "Scheduler",
    "Status",
    "Ticket",
    "measured_costs",
    "planned",
    "pressure",
    "turned",
]
