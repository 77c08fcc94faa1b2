"""Offers tools to agents over MCP, on stdin and stdout.

The protocol is answered at once, also while the model loads: agents give a server few seconds. A
call waits for the model. Whatever else is printed goes to stderr, as the SDK sees to.
"""

import asyncio
import json
from contextlib import suppress
from functools import partial
from typing import Any

from anyio import CancelScope
from mcp import types
from mcp.server import Server, ServerRequestContext
from mcp.server.stdio import stdio_server
from pydantic import ValidationError

from ..errors import Error
from ..tasks.request import Draft, Prepared
from .invalid import mistake
from .mcp_tools import TOOLS, Tool, kept
from .preparing import QUICK_BYTES, Places
from .thread import MlxThread
from .worker import Busy, Patience, Worker

# Seconds between two reports of how far a call has come, to clients that ask for them.
REPORT_SECONDS = 1.0

# Characters of an error, which may quote what was sent.
MOST_TOLD = 1000

INSTRUCTIONS = (
    "A local diffusion language model. It writes anywhere in a text at once: use fill for holes in "
    "a text, edit for small repairs, choose to weigh labels, extract for JSON by a schema."
)

Context = ServerRequestContext[Any, Any]


async def serve(thread: MlxThread, version: str) -> None:
    """Answer on stdin and stdout until stdin ends; the thread is started and stopped here."""
    async with stdio_server() as (reads, writes):
        loading = asyncio.create_task(asyncio.to_thread(thread.start))
        server = _server(thread.workers[0], loading, version)
        try:
            await server.run(reads, writes, server.create_initialization_options())
        finally:
            # Also where the agent is gone: a worker that is not stopped keeps the process for ever.
            with CancelScope(shield=True), suppress(Exception):
                await loading
            thread.stop()


def _server(worker: Worker, loading: asyncio.Task[None], version: str) -> Server[Any]:
    """Make a server whose calls wait until `loading` is done."""
    tools = {tool.name: tool for tool in TOOLS}
    listed = types.ListToolsResult(tools=[_described(tool) for tool in TOOLS])
    places = Places()

    async def list_tools(
        context: Context, asked: types.PaginatedRequestParams | None
    ) -> types.ListToolsResult:
        return listed

    async def call(context: Context, asked: types.CallToolRequestParams) -> types.CallToolResult:
        tool = tools.get(asked.name)
        if tool is None:
            return _failed(f"there is no tool {asked.name!r}; there are {', '.join(tools)}")
        given = asked.arguments or {}
        try:
            task = tool.task(tool.arguments.model_validate(given, by_name=False, by_alias=True))
            await asyncio.shield(loading)
            patience = worker.patience()
            quick = not tool.slow and len(str(given)) <= QUICK_BYTES
            try:
                prepare = partial(worker.prepare, task, patience)
                work = await places.prepare(prepare, quick=quick)
                found = tool.facts(await _answered(worker, work, patience, context))
            finally:
                patience.gone = True
        except ValidationError as error:
            places_of = [{**each, "loc": ("", *each["loc"])} for each in error.errors()]
            return _failed(mistake(places_of, given)[0])
        except Busy:
            return _failed("the server is busy, try again soon")
        except Error as error:
            return _failed(str(error))
        text = json.dumps(found, ensure_ascii=False)
        content: list[types.ContentBlock] = [types.TextContent(text=text)]
        return types.CallToolResult(content=content, structured_content=found)

    return Server(
        "mlx-diffgemma",
        version=version,
        instructions=INSTRUCTIONS,
        on_list_tools=list_tools,
        on_call_tool=call,
    )


def _described(tool: Tool[Any]) -> types.Tool:
    """Write a tool as the protocol has it."""
    return types.Tool(
        name=tool.name,
        title=tool.title,
        description=tool.description,
        input_schema=tool.arguments.model_json_schema(),
        output_schema=tool.output,
        # Nothing but the answer comes of a call.
        annotations=types.ToolAnnotations(read_only_hint=True, open_world_hint=False),
    )


def _failed(sentence: str) -> types.CallToolResult:
    """Make an error of a tool, which the agent's model reads and can mend."""
    if len(sentence) > MOST_TOLD:
        sentence = f"{sentence[: MOST_TOLD - 3]}..."
    return types.CallToolResult(content=[types.TextContent(text=sentence)], is_error=True)


async def _answered(
    worker: Worker, work: Prepared[object], patience: Patience, context: Context
) -> list[object]:
    """Collect the events of a piece of work, and report how far it has come.

    Cancelled, it stops the work within a step.

    Raises:
        Busy: the queue is full.
        Error: as the work does.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    events: list[object] = []
    drafts: list[Draft] = []

    def end() -> None:
        if not ended.done():
            ended.set_result(None)

    def listen(event: object) -> None:  # on the worker's thread
        if event is None:
            with suppress(RuntimeError):  # the loop has gone
                loop.call_soon_threadsafe(end)
        elif isinstance(event, Draft):
            drafts.append(event)
            del drafts[:-1]
        elif kept(event):
            events.append(event)

    ticket = worker.submit(work, listen, patience)
    steps = 0.0
    try:
        while not (await asyncio.wait({ended}, timeout=REPORT_SECONDS))[0]:
            if drafts:
                steps += 1
                await context.session.report_progress(steps, message=drafts[-1].text)
    finally:
        worker.cancel(ticket)  # which is nothing new to work that has ended
    for event in events:
        if isinstance(event, Exception):
            raise event
    return events
