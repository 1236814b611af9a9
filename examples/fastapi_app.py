"""FastAPI and RQ with jobguard.

Start the API:   uvicorn fastapi_app:api --app-dir examples
Start a worker:  rq worker mail --worker-class jobguard.adapters.rq.Worker --path examples
Send a job:      curl -X POST 'localhost:8000/mail?address=ada@example.org'
"""

from fastapi import FastAPI
from rq_app import queue
from rq_tasks import send_mail

api = FastAPI()


@api.post("/mail")
def mail(address: str) -> dict[str, str]:
    """Enqueue one mail. The job is recorded before the response goes out."""
    return {"id": queue.enqueue(send_mail, address).id}


if __name__ == "__main__":
    from fastapi.testclient import TestClient

    print("sent", TestClient(api).post("/mail", params={"address": "ada@example.org"}).json()["id"])
