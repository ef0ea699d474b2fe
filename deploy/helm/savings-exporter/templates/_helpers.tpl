{{- define "savings-exporter.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "savings-exporter.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "savings-exporter.labels" -}}
{{ include "savings-exporter.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* The names at which other pods reach the service. Names with dots are refused unless they are allowed. */}}
{{- define "savings-exporter.hosts" -}}
{{- $name := printf "%s.%s" (include "savings-exporter.fullname" .) .Release.Namespace -}}
{{- $own := list $name (printf "%s.svc" $name) (printf "%s.svc.cluster.local" $name) -}}
{{- concat $own .Values.web.allowedHosts | join " " -}}
{{- end -}}
