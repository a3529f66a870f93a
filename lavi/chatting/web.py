"""The chat as a page in the browser (gradio, an extra), for this computer alone: nothing is sent out."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr

from lavi.chatting.page import Page
from lavi.chatting.terminal import note

LOOPBACK = "127.0.0.1"
LARGEST = "2gb"
"""Of a video that is dropped into the page."""
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
"""Of the reader's own system: gradio's would be fetched from elsewhere."""

NO_SHARING = "button[aria-label=Share] {display: none}"
"""Beside each picture gradio has a button that would send it to a public page."""


def interface(page: Page, *, title: str, files: Sequence[str] = ()) -> gr.ChatInterface:
    """The page.

    Args:
        files: images and videos that stand before the first question.
    """
    shown = [{"role": "user", "content": {"path": file}} for file in files]
    textbox = gr.MultimodalTextbox(
        file_types=["image", "video"],
        file_count="multiple",
        placeholder="Ask, or add images and videos",
        stop_btn=True,
    )
    buttons = ["copy", "copy_all"]  # gradio has one more, which would send the conversation to a public page
    return gr.ChatInterface(
        page.answer,
        multimodal=True,
        chatbot=gr.Chatbot(value=shown, height="75vh", show_label=False, buttons=buttons),
        textbox=textbox,
        title=title,
        analytics_enabled=False,
        api_visibility="private",
    )


def serve(page: Page, *, title: str, files: Sequence[str] = ()) -> None:
    """Show the page until Ctrl-C; what was dropped into it is gone then."""
    with tempfile.TemporaryDirectory(prefix="lavi-page-") as folder:  # gradio's own is everybody's, and is kept
        os.environ["GRADIO_TEMP_DIR"] = folder
        _serve(interface(page, title=title, files=files), files)


def _serve(chat: gr.ChatInterface, files: Sequence[str]) -> None:
    _, address, _ = chat.launch(
        server_name=LOOPBACK,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        allowed_paths=list(files),
        footer_links=[],
        css=NO_SHARING,
        theme=gr.themes.Default(**FONTS),
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        max_file_size=LARGEST,
    )
    note(f"The chat is at {address} until Ctrl-C.")
    chat.block_thread()
