"""An HTTP server in the form of OpenAI's API, over a local pair or over two servers."""
