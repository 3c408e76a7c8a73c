"""A bound on decoded scans that wait for the networks, besides what Ray's object store can take."""

from ray.data import DataContext
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
)
from ray.data._internal.execution.backpressure_policy.backpressure_policy import BackpressurePolicy
from ray.data._internal.execution.interfaces.physical_operator import PhysicalOperator
from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator

MAX_WAITING = "darnet.max_waiting_scans"


class WaitingScansPolicy(BackpressurePolicy):
    """While as many scans wait before a pool of actors as may, no task that makes more is begun, and none is read on.

    Where no task is active, as before the first actor is ready, Ray begins one whatever a policy says: so those under
    way must not end. One that is not read pauses after two blocks and keeps its CPU. If the pool needs that to replace
    an actor, Ray lets a block of it pass every ten seconds, until it has ended. A pool whose bound is two batches an
    actor or more always has a whole one to take.
    """

    def can_add_input(self, op: PhysicalOperator) -> bool:
        """Whether a task may be begun."""
        return not self._is_full(op)

    def max_task_output_bytes_to_read(self, op: PhysicalOperator) -> int | None:
        """None is as much as there is."""
        return 0 if self._is_full(op) else None

    def _is_full(self, op: PhysicalOperator) -> bool:
        pools = [pool for pool in op.output_dependencies if isinstance(pool, ActorPoolMapOperator)]
        max_waiting = self._data_context.get_config(MAX_WAITING)
        if not pools or max_waiting is None:
            return False
        num_taken = sum(pool.metrics.rows_inputs_of_submitted_tasks for pool in pools)
        return bool(op.metrics.rows_task_outputs_generated - num_taken >= max_waiting)


def bound_waiting(context: DataContext, max_waiting: int | None) -> None:
    """Let `max_waiting` rows, two batches an actor or more, wait in data sets made from now on; None: no such bound."""
    context.set_config(MAX_WAITING, max_waiting)
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, WaitingScansPolicy])
