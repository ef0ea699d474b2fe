"""The paths of the service that other modules and the command line name, too."""

SAVINGS_PATH = "/v1/savings"
HISTORY_PATH = "/v1/history"
HEALTHY_PATH = "/-/healthy"
READY_PATH = "/-/ready"
DOCUMENTS_PATH = "/docs/"
