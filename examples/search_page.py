"""A search page of your own, without a server of models.

radapter-index build PHOTOS --out indexes/photos
python examples/search_page.py photos [PORT]

It answers at http://127.0.0.1:8080, this machine only.
"""

import sys
from base64 import b64encode
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from radapter_serve import Model

FORM = '<meta charset="utf-8"><form><input name="q" value="{}" autofocus></form>'
FIGURE = '<figure><img src="data:image/jpeg;base64,{}"><figcaption>{}</figcaption></figure>'


def page_server(index: str, port: int = 8080) -> ThreadingHTTPServer:
    model = Model("model_repository")

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query).get("q", [""])[0]
            page = FORM.format(escape(query))
            for hit in model.search(query, index=index, thumbnails=True) if query else []:
                image = b64encode(hit.thumbnail or b"").decode()
                page += FIGURE.format(image, f"{escape(hit.id)} {hit.score:.3f}")
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

    return ThreadingHTTPServer(("127.0.0.1", port), Page)


if __name__ == "__main__":
    page_server(sys.argv[1], *map(int, sys.argv[2:])).serve_forever()
