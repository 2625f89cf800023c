"""From a row to a chat: chat formats, parts of messages, tools and their calls."""
