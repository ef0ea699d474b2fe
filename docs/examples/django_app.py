"""Django: gunicorn --workers 4 django_app:application, with --preload or without.

In a larger project, create the tracker in a separate module, such as ``savings.py``, and import it in the views and in
``wsgi.py``.
"""

import os

import django
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, JsonResponse
from django.urls import path

from savings_exporter import SavingsTracker
from savings_exporter.embedding import mount_wsgi

settings.configure(ALLOWED_HOSTS=["127.0.0.1"], ROOT_URLCONF=__name__, SECRET_KEY=os.urandom(16).hex())
django.setup()

tracker = SavingsTracker(os.environ.get("SAVINGS_STORE", "proxy_savings.json"))


def complete(_request: HttpRequest) -> JsonResponse:
    receipt = tracker.record_request(model="gpt-5", provider="openai", input_tokens=12_000, tokens_saved=4_096)
    return JsonResponse({"durable": receipt.durable})


urlpatterns = [path("complete", complete)]
application = mount_wsgi(get_wsgi_application(), tracker, "/savings")
