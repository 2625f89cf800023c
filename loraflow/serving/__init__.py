"""Use a model: chat, batch prediction, an HTTP server, publishing on the hub, and facts about the champion."""
