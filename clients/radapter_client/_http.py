"""HTTP: tritonclient's request and response bodies over urllib3 and aiohttp.

tritonclient's own HTTP client is not safe from several threads and takes its time-outs only when it is made; urllib3's
pool is safe, has time-outs by the call and TLS, and the bodies are public functions of tritonclient.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import aiohttp
import tritonclient.http
import urllib3
from tritonclient.utils import InferenceServerException

from ._exceptions import RAdapterClientError, ServerError, ServerUnavailable, Timeout, from_server
from ._url import ServerURL
from ._wire import Request, Tensors, infer_inputs

HEADER_LENGTH = "Inference-Header-Content-Length"
CONNECTIONS = 64  # kept open for the next request; more are opened where more threads ask
TAILS = {"infer": "/infer", "config": "/config", "ready": "/ready", "statistics": "/stats"}
Call = tuple[str, str, bytes | None, dict[str, str]]


class _Http:
    def __init__(self, url: ServerURL) -> None:
        self._url = url

    def _call(self, request: Request) -> Call:
        """Method, URL, body and headers."""
        path = "/v2/models"
        if request.model:
            path += f"/{quote(request.model)}" + (f"/versions/{request.version}" if request.version else "")
        target = f"{self._url}{path}{TAILS[request.action]}"
        if request.action != "infer":
            return "GET", target, None, {}
        inputs = infer_inputs(tritonclient.http, request.inputs)
        outputs = [tritonclient.http.InferRequestedOutput(name) for name in request.outputs] or None
        body, header_length = tritonclient.http.InferenceServerClient.generate_request_body(inputs, outputs=outputs)
        headers = {"Content-Type": "application/octet-stream"}
        if header_length is not None:
            headers[HEADER_LENGTH] = str(header_length)
        return "POST", target, body, headers

    def _reply(self, request: Request, status: int, headers: Mapping[str, str], body: bytes) -> Any:
        if request.action == "ready" and status in (200, 400, 404):
            return status == 200
        if status != 200:
            raise from_server(str(status), self._message(body))
        try:
            if request.action != "infer":
                return json.loads(body)
            length = headers.get(HEADER_LENGTH)
            result = tritonclient.http.InferenceServerClient.parse_response_body(
                body, header_length=None if length is None else int(length)
            )
            response = result.get_response()
            outputs = {output["name"]: result.as_numpy(output["name"]) for output in response["outputs"]}
            return Tensors(int(response["model_version"]), outputs)
        except (InferenceServerException, ValueError, KeyError, TypeError) as error:
            raise ServerError(f"{self._url} answers, but not as a Triton server does: {error!r}") from error

    @staticmethod
    def _message(body: bytes) -> str:
        text = body.decode("utf-8", "replace")
        try:
            return str(json.loads(text)["error"])
        except (ValueError, KeyError, TypeError):
            return text[:200]

    def _late(self, timeout: float) -> Timeout:
        return Timeout(f"no answer from {self._url} within {timeout:g} s")

    def _gone(self, error: Exception) -> RAdapterClientError:
        return ServerUnavailable(f"no answer from {self._url}: {error}; is the server running (radapter-serve)?")


class HttpTransport(_Http):
    def __init__(self, url: ServerURL) -> None:
        super().__init__(url)
        self._pool = urllib3.PoolManager(maxsize=CONNECTIONS)

    def send(self, request: Request, timeout: float) -> Any:
        method, target, body, headers = self._call(request)
        try:
            response = self._pool.request(
                method,
                target,
                body=body,
                headers=headers,
                timeout=urllib3.Timeout(total=timeout),
                retries=False,
                redirect=False,
            )
        except urllib3.exceptions.NewConnectionError as error:  # to urllib3 a time-out, too
            raise self._gone(error) from error
        except urllib3.exceptions.TimeoutError as error:
            raise self._late(timeout) from error
        except urllib3.exceptions.HTTPError as error:
            if any(isinstance(argument, TimeoutError) for argument in error.args):  # while the body was being sent
                raise self._late(timeout) from error
            raise self._gone(error) from error
        return self._reply(request, response.status, response.headers, response.data)

    def close(self) -> None:
        self._pool.clear()


class AsyncHttpTransport(_Http):
    def __init__(self, url: ServerURL) -> None:
        super().__init__(url)
        self._session: aiohttp.ClientSession | None = None  # belongs to the event loop of the first call

    async def send(self, request: Request, timeout: float) -> Any:
        if self._session is None:
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        method, target, body, headers = self._call(request)
        try:
            async with self._session.request(
                method,
                target,
                data=body,
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=timeout),
                allow_redirects=False,
            ) as response:
                return self._reply(request, response.status, response.headers, await response.read())
        except (asyncio.TimeoutError, TimeoutError) as error:  # two classes in Python 3.10
            raise self._late(timeout) from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._gone(error) from error

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
