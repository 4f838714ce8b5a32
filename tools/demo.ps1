# tools\demo.ps1: convert the bundled model, let the original and the converted one write, show what changed.
# powershell -ExecutionPolicy Bypass -File tools\demo.ps1
$ErrorActionPreference = "Stop"
Set-Location (Join-Path $PSScriptRoot "..")
$python = ".venv\Scripts\python.exe"
if (-not (Test-Path $python)) {
    Write-Host "making .venv with ovtq[genai] ..."
    python -m venv .venv
    if ($LASTEXITCODE) { exit $LASTEXITCODE }
}
& $python -m pip install --quiet --disable-pip-version-check -c tools\constraints.txt -e ".[genai]"
if ($LASTEXITCODE) { exit $LASTEXITCODE }
& $python -m ovtq.demo
exit $LASTEXITCODE
