"""A headless Chromium that is on this machine, and what a test asks of a page in it."""

import contextlib
import shutil

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
#: The relative luminance of a colour and the contrast of two, by WCAG 2.1; colours as the browser computes them.
CONTRAST = """
  const luminance = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255)
      .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
"""


class Opened:
    """A page in a tab, with everything that the browser complained of or asked for."""

    def __init__(self, tab):
        self.tab, self.complaints, self.requests = tab, [], []
        tab.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        tab.on("request", lambda request: self.requests.append(request.url))

    def ask(self, script, argument=None):
        return self.tab.evaluate(script, argument)

    def texts(self, selector):
        return [" ".join(text.split()) for text in self.tab.locator(selector).all_text_contents()]


@contextlib.contextmanager
def opened(browser, file, *, width=1300, height=900, dark=False, scripts=True, paper=False):
    """The page in a window of this size; `paper`: as it is printed."""
    with contextlib.closing(
        browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            java_script_enabled=scripts,
        )
    ) as context:
        page = Opened(context.new_page())
        if paper:
            page.tab.emulate_media(media="print")
        page.tab.goto(file.as_uri())
        yield page
