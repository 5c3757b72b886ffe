"""Serving: an engine that keeps deadlines by turning the dial, and HTTP around it."""

from tokendial.serve.scheduling.controller import Dial, Observed, Rules, planned, pressure, turned
from tokendial.serve.scheduling.costs import Costs, measured_costs
from tokendial.serve.scheduling.engine import Answer, BatchDone, Engine, Status
from tokendial.serve.scheduling.scheduler import Batch, Refused, Scheduler, Ticket

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
