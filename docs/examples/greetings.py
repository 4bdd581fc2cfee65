"""A route that submits a task."""

from diracx.routers.fastapi_classes import DiracxRouter
from my_tasks import Hello

router = DiracxRouter()


@router.post("/greet/{name}")
async def greet(name: str) -> str:
    """Returns the task's id."""
    return await Hello(name).schedule()
