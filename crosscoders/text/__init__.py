"""Documents, token ids and chats."""
