"""The engine process, with a device that does what no kernel should: run as `python -m tests.engine.poisoned_engine`.

From the first step after the tenth token on, the page table points beyond all memory.
"""

from __future__ import annotations

import sys

from tgi_server.engine import __main__ as engine
from tgi_server.engine.gpu_runner import GpuRunner
from tgi_server.engine.plan import Plan
from tgi_server.engine.staging import Fetched


class Poisoned(GpuRunner):
    def launch(self, plan: Plan) -> Fetched:
        if any(work.start >= 10 for work in plan.work):
            self._state.page_table.fill_(2**30)
        return super().launch(plan)


if __name__ == "__main__":
    vars(engine)["GpuRunner"] = Poisoned
    sys.exit(engine.main())
