"""What ``from transmla.finetune import …`` gives: see docs/reference/python-api.md."""

from transmla.finetune.report import FinetuneReport
from transmla.finetune.run import finetune

__all__ = ["FinetuneReport", "finetune"]
