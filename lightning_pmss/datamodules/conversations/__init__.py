"""Conversations from files of many layouts, rendered by a chat template, with the loss on the assistant's turns."""
