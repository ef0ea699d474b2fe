"""Django: gunicorn --workers 4 django_app:application.

In a larger project, create the tracker in a separate module, such as ``savings.py``, and import it in the views.
"""

import os

import django
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from savings_exporter import SavingsCollector, SavingsTracker

settings.configure(ALLOWED_HOSTS=["127.0.0.1"], ROOT_URLCONF=__name__, SECRET_KEY=os.urandom(16).hex())
django.setup()

tracker = SavingsTracker(os.environ.get("SAVINGS_STORE", "proxy_savings.json"))
registry = CollectorRegistry()
registry.register(SavingsCollector(tracker))


def complete(_request: HttpRequest) -> JsonResponse:
    receipt = tracker.record_request(model="gpt-5", provider="openai", input_tokens=12_000, tokens_saved=4_096)
    return JsonResponse({"durable": receipt.durable})


def metrics(_request: HttpRequest) -> HttpResponse:
    return HttpResponse(generate_latest(registry), content_type=CONTENT_TYPE_LATEST)


urlpatterns = [path("complete", complete), path("metrics", metrics)]
application = get_wsgi_application()
